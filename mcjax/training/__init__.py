"""Training: text stores, losses, and the trainers of GistNet and LensNet."""
