"""The evaluations, one module each."""
