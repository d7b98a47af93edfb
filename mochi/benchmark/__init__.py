"""What each part costs, beside its ceiling or its plain counterpart, in one run on one machine."""
