"""What every long run needs."""
