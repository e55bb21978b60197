"""Sweeps: one experiment under every setting of a grid."""
