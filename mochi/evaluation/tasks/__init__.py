"""Evaluations on frozen features, a module or a package each; docs/extending.md adds one."""
