"""Texts and questions of the suites."""
