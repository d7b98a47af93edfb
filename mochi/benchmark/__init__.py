"""What things cost here, each beside its ceiling, as ratios within one run."""
