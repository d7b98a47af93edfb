"""A trained encoder on any folder of images: vectors to take home, and sheets of neighbours to look at."""
