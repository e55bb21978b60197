"""Bootstrap intervals of means and of paired differences.

Questions about one history or document have much in common, so where groups
are given whole groups are drawn.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

_DRAWS = 2000


class Interval(NamedTuple):
  """A mean, its 95 % interval, and how many values it is of."""

  value: float
  low: float
  high: float
  n: int


def of_mean(values: Sequence[float] | np.ndarray,
            groups: Sequence[Hashable] | None = None,
            seed: int = 0) -> Interval | None:
  """Mean of values [n] with a 95 % percentile bootstrap; None of none.

  Args:
    values: numbers or booleans; NaN is left out.
    groups: [n] what each belongs to; each by itself by default.
    seed: of the draws.
  """
  x = np.asarray(values, np.float64)
  there = ~np.isnan(x)
  if not np.any(there):
    return None
  names = range(len(x)) if groups is None else groups
  number = {name: i for i, name in enumerate(dict.fromkeys(names))}
  group = np.array([number[name] for name in names])[there]
  x = x[there]
  sums = np.bincount(group, x, len(number))
  counts = np.bincount(group, minlength=len(number))
  present = np.flatnonzero(counts)
  rng = np.random.default_rng(seed)
  draws = rng.choice(present, (_DRAWS, len(present)))
  means = sums[draws].sum(1) / counts[draws].sum(1)
  low, high = np.percentile(means, [2.5, 97.5])
  return Interval(float(x.mean()), float(low), float(high), len(x))


def of_ratio(values: Sequence[float], others: Sequence[float],
             groups: Sequence[Hashable] | None = None, seed: int = 0
             ) -> Interval | None:
  """Mean of values over that of others, both drawn together; see `of_mean`.

  None where the others' mean is zero; draws in which it is are left out.
  """
  a, b = np.asarray(values, np.float64), np.asarray(others, np.float64)
  if not b.sum():
    return None
  names = list(range(len(a)) if groups is None else groups)
  number = {name: i for i, name in enumerate(dict.fromkeys(names))}
  group = np.array([number[name] for name in names], np.int64)
  tops, bottoms = (np.bincount(group, x, len(number)) for x in (a, b))
  rng = np.random.default_rng(seed)
  draws = rng.integers(len(number), size=(_DRAWS, len(number)))
  over, under = tops[draws].sum(1), bottoms[draws].sum(1)
  low, high = np.percentile(over[under > 0] / under[under > 0], [2.5, 97.5])
  return Interval(float(a.sum() / b.sum()), float(low), float(high), len(a))


def of_difference(values: Sequence[float], others: Sequence[float],
                  groups: Sequence[Hashable] | None = None, seed: int = 0
                  ) -> Interval | None:
  """As `of_mean`, of values minus others, taken pair by pair."""
  a, b = np.asarray(values, np.float64), np.asarray(others, np.float64)
  return of_mean(a - b, groups, seed)
