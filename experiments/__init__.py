"""Command lines: thin absl mains over the package."""
