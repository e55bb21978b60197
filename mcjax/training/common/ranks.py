"""Rank correlation with ties (Spearman 1904)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float]) -> np.ndarray:
  """Ranks [n] from 1, equal values sharing their mean rank."""
  _, where, counts = np.unique(
    np.asarray(values, np.float64), return_inverse=True, return_counts=True
  )
  last = np.cumsum(counts)
  return (last - (counts - 1) / 2)[where]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
  """Rank correlation of two lists; 0 where one of them is constant.

  A constant list ranks nothing: a policy that tells no edit from another
  counts as uninformed, not as missing.

  Raises:
    ValueError: lists of different lengths.
  """
  if len(a) != len(b):
    raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
  if not len(a):
    return 0.0
  x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
  norm = np.sqrt((x @ x) * (y @ y))
  return float(x @ y / norm) if norm > 0 else 0.0
