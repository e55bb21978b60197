"""GistNet: 32 vectors in, one gist out."""
