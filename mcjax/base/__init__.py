"""The frozen base language model: decoder, loaders, named models."""
