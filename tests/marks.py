"""Marks of the tests."""

import pytest


def further(*cases):
  """Cases of a parametrised test that only `tools/test --slow` runs.

  A case of several values is a tuple.
  """
  return [
    pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow)
    for c in cases
  ]


# Wherever a tree can lie, for tests that take its `url`.
EVERYWHERE = pytest.mark.parametrize(
  "url", ["memory", "file", "s3"], indirect=True)
BUCKET_SLOWLY = pytest.mark.parametrize(
  "url", ["memory", "file", *further("s3")], indirect=True)
