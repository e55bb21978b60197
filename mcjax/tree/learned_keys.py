"""Learned keys: small vectors whose elementwise bounds rise up the tree.

The stored tree calls them lens keys, after LensNet, which makes them.

A block's key is int8 [K] and its score for a query is their inner product. A
node above holds the elementwise minimum and maximum of the keys below it, so a
query's score on it bounds the score of every block below (the page bounds of
Quest, Tang et al. 2024, carried up a tree). Queries are whole numbers, so all
sums are exact: bounds hold and ties are ties. Scores may be negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

KEY_MAX = 127  # keys are in -127..127
QUERY_MAX = 2**15 - 1  # the largest component of a quantised query


class Keyer(Protocol):
  """What the tree needs of a learned key projection.

  Attributes:
    fingerprint: identity of the weights, and of the GistNet they read.
    key_dim: K.
  """

  fingerprint: str
  key_dim: int

  def encode_keys(self, token_ids: np.ndarray, gists: np.ndarray) -> np.ndarray:
    """int32 [n, 32], stored gists float32 [n, D] -> int8 [n, K], not -128."""


def key_width(level: int, key_dim: int) -> int:
  """Bytes of the key of a node of `level` (at least 1)."""
  return key_dim if level == 1 else 2 * key_dim


def block_keys(
  keyer: Keyer, token_ids: np.ndarray, gists: np.ndarray
) -> np.ndarray:
  """Checked keys of blocks: int32 [n, 32], float32 [n, D] -> int8 [n, K].

  Raises:
    ValueError: the keyer's keys are of another shape or type, or hold -128.
  """
  keys = np.asarray(keyer.encode_keys(token_ids, gists))
  expected = len(token_ids), keyer.key_dim
  if keys.dtype != np.int8 or keys.shape != expected:
    raise ValueError(
      f"lens keys are {keys.dtype}{list(keys.shape)}, not int8{list(expected)}"
    )
  if keys.size and keys.min() < -KEY_MAX:
    raise ValueError(f"a lens key is below -{KEY_MAX}")
  return keys


def bounds(children: np.ndarray, key_dim: int) -> np.ndarray:
  """Keys of parents: int8 [n, 32, K or 2K] -> int8 [n, 2K], min then max."""
  low = children[..., :key_dim].min(axis=1)
  high = children[..., -key_dim:].max(axis=1)
  return np.concatenate([low, high], axis=1)


def quantise(query: np.ndarray) -> np.ndarray:
  """float [K] -> int32 [K], its largest component at +-QUERY_MAX.

  The scale is the query's own: scores of two queries do not compare.

  Raises:
    ValueError: a component is not finite.
  """
  query = np.asarray(query, np.float64)
  if not np.isfinite(query).all():
    raise ValueError("the query is not finite")
  largest = np.abs(query).max(initial=0.0)
  if largest > 0:
    query = query / largest
  return np.rint(query * QUERY_MAX).astype(np.int32)


def scorer(query: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """The `score_keys` of a search for a query.

  Args:
    query: int [K], as from `quantise`.

  Returns:
    int8 [n, K] -> the scores k.q of blocks, and int8 [n, 2K] -> the bounds
    sum_d max(q_d * min_d, q_d * max_d) of nodes above; float64 [n], exact.

  Raises:
    ValueError: the query is not of whole numbers; by the callable: the keys
      are of another width.
  """
  query = np.asarray(query)
  if query.ndim != 1 or query.dtype.kind not in "iu":
    raise ValueError(f"a query is {query.dtype}{list(query.shape)}, not int[K]")
  # Sums of whole numbers are exact below 2**24 in float32, 2**53 in float64.
  largest = KEY_MAX * np.abs(query.astype(np.int64)).sum()
  real = np.float32 if largest < 2**24 else np.float64
  weights = query.astype(real)
  bound_weights = np.concatenate(
    [np.minimum(weights, 0), np.maximum(weights, 0)]
  )

  def score(keys: np.ndarray) -> np.ndarray:
    if keys.shape[1] == len(weights):
      return (keys.astype(real) @ weights).astype(np.float64)
    if keys.shape[1] == len(bound_weights):
      return (keys.astype(real) @ bound_weights).astype(np.float64)
    raise ValueError(f"keys {keys.shape} do not fit a query of {len(weights)}")

  return score
