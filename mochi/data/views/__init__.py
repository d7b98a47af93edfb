"""From stored images to augmented batches."""
