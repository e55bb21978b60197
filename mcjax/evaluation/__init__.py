"""Evaluations: one file a suite, baselines, and the report they write."""
