"""Evaluations on frozen features, a module each with a function `evaluate`."""
