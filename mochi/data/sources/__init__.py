"""One module for each origin of images."""
