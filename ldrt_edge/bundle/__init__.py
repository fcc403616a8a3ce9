"""What reaches the clinic must be what was tested: one signed file that carries a model and what was measured of it."""
