"""What can be known about an experiment before anything is computed."""
