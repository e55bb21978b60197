"""Training of GistNet."""
