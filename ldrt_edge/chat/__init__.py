"""Chat over any model folder: the session engine and the terminal."""
