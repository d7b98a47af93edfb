"""Images: sources, storage, and views for the encoder."""
