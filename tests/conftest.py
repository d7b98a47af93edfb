"""Settings of every test."""

from hypothesis import settings

# Machines are noisy: a slow example is no failure.
settings.register_profile("mochi", deadline=None, print_blob=True)
settings.load_profile("mochi")
