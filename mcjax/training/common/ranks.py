"""Rank correlation with ties (Spearman 1904)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def ranks(values: ArrayLike) -> np.ndarray:
  """Ranks [n] from 1, equal values sharing their mean rank."""
  _, where, counts = np.unique(
    np.asarray(values, np.float64), return_inverse=True, return_counts=True
  )
  last = np.cumsum(counts)
  return (last - (counts - 1) / 2)[where]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
  """Rank correlation of two lists; 0 where one of them is constant.

  A constant list ranks nothing: a policy that tells no edit from another
  counts as uninformed, not as missing.

  Raises:
    ValueError: lists of different lengths.
  """
  x, y = ranks(a), ranks(b)
  if len(x) != len(y):
    raise ValueError(f"{len(x)} and {len(y)} values cannot be paired")
  if not len(x):
    return 0.0
  x, y = x - x.mean(), y - y.mean()
  norm = np.sqrt((x @ x) * (y @ y))
  return float(x @ y / norm) if norm > 0 else 0.0
