"""Detection transfer."""
