"""Meshes, sharding rules and checkpoints."""
