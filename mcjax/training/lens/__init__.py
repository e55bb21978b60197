"""Training of LensNet and of its keys."""
