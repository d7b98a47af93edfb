"""From raw images to batches of views."""
