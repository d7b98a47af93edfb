"""The paper as tensor mathematics."""
