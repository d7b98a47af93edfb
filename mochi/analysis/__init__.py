"""Analysis of an encoder: geometry of its features, nearest images, a map; as pictures and JSON."""
