"""LensNet: the learned focus controller."""
