"""Runtimes: one protocol (`base`), one loaded model each."""
