"""Evaluations on frozen features, one module or package each; see docs/extending.md."""
