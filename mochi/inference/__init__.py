"""Apply a trained encoder to any folder of images: feature files and sheets of neighbours."""
