"""Files on disk: atomic writes and resume checkpoints."""
