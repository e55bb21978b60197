"""Figures as JSON, tables and plots."""
