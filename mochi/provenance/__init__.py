"""Where a result comes from, and whether it is current."""
