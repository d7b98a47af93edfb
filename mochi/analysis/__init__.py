"""What an encoder has learned: geometry of its features, nearest images, a map. Pictures and JSON."""
