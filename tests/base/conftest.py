"""Fixtures of the base LM's tests."""

import pathlib

import numpy as np
import pytest

_GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def goldens():
  """Arrays written by tools/make_goldens."""
  with np.load(_GOLDENS / "base_lm.npz") as stored:
    return dict(stored)
