"""`python -m mochi`."""

from mochi.cli import main

main()
