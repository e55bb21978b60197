"""Tiny bases, encoders and trees, for tests of mcjax and of its users."""
