"""Fixtures of the base LM's tests; puts this folder on the import path."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

_GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="session")
def goldens():
  """Arrays written by tools/make_goldens."""
  with np.load(_GOLDENS / "base_lm.npz") as stored:
    return dict(stored)
