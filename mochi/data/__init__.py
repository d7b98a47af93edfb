"""Images: where they come from, how they are stored, and how views of them reach the encoder."""
