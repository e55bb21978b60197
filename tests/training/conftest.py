"""The tiny base and text store of the training tests."""

from training_cases import *  # noqa: F403
