"""Merged weights to what a laptop loads: GGUF, quantisation, and the proof that they agree."""
