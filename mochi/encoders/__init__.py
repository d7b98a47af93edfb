"""Encoders: architectures and encoder files."""
