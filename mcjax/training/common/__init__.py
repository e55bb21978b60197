"""Data, settings and metrics of every training run."""
