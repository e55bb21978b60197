"""Lexical keys: what a node's tokens are, as a bitmap that bounds its subtree.

A coarse gist cannot show that one sentence inside it matters. A key can: bit
h(f) of a node's key is set if the feature f (a token, or two adjacent tokens)
occurs below the node. A parent's key is the union of its children's, so a
query's score on a parent bounds its score on every descendant (the page bounds
of Quest, Tang et al. 2024, carried up a tree), and a best-first search from
the roots finds the best blocks while it touches few nodes.

A feature's 32-bit hash is cut to the key's width, which grows with the level
because a wider span holds more distinct tokens. A block's features include
those of the `LOOKBACK` tokens before it, so that a sentence across a block
boundary is seen whole by one block.
"""

from __future__ import annotations

from jaxtyping import Bool, Float64, Int, UInt8
import numpy as np

from mcjax.types import BRANCHING

SCHEME = "lexical-bitmap-1"  # stored with a tree; change it with the bits
LOOKBACK = 16  # tokens before a span that its key also covers
PAIR = 1.0  # weight of two adjacent query tokens, of the smaller one's
_BYTES = (0, 1024, 2048, 16384)  # key bytes at level 1, 2, and 3 and up
_SCALE = 1024  # scores are sums of integers: exact, so that bounds and ties are


def key_dim(level: int) -> int:
  """Bytes of the key of a node of `level` (at least 1)."""
  return _BYTES[min(level, len(_BYTES) - 1)]


def _mix(values: np.ndarray) -> np.ndarray:
  """A 32-bit hash (splitmix64's finaliser) of each uint64."""
  with np.errstate(over="ignore"):
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x ^ (x >> np.uint64(31))).astype(np.uint32)


def _token_hash(token_ids: np.ndarray) -> np.ndarray:
  return _mix(token_ids.astype(np.uint64))


def _pair_hash(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  pair = (first.astype(np.uint64) + np.uint64(1)) << np.uint64(32)
  return _mix(pair | second.astype(np.uint64))


def sketch(spans: Int[np.ndarray, "n T"], level: int
           ) -> UInt8[np.ndarray, "n bytes"]:
  """Keys of spans of tokens.

  Args:
    spans: int [n, T], -1 where there is no token.
    level: sets the width.

  Returns:
    uint8 [n, key_dim(level)].
  """
  n, bits = len(spans), 8 * key_dim(level)
  mask = np.uint32(bits - 1)
  flags = np.zeros((n, bits), np.bool_)
  rows = np.broadcast_to(np.arange(n)[:, None], spans.shape)
  here = spans >= 0
  flags[rows[here], _token_hash(spans[here]) & mask] = True
  both = here[:, :-1] & here[:, 1:]
  pairs = _pair_hash(spans[:, :-1][both], spans[:, 1:][both])
  flags[rows[:, 1:][both], pairs & mask] = True
  return np.packbits(flags, axis=1, bitorder="little")


def union(children: UInt8[np.ndarray, "n 32 bytes"]
          ) -> UInt8[np.ndarray, "n bytes"]:
  """Keys of parents: uint8 [n, 32, key_dim] -> uint8 [n, key_dim]."""
  return np.bitwise_or.reduce(children, axis=1)


def key_read_bytes(level: int, nodes: int) -> int:
  """Bytes behind the keys of so many nodes; at level 1 those are tokens."""
  return nodes * (BRANCHING * 2 if level == 1 else key_dim(level))


class LexicalScorer:
  """Scores keys by the weight of the query's features they may hold."""

  def __init__(
    self, query_ids: np.ndarray, weights: np.ndarray, pair_weight: float = PAIR
  ):
    """Args: query_ids int [Q] and float [Q] weights, zero or more."""
    features: dict[int, float] = {}
    hashes = _token_hash(query_ids)
    for h, w in zip(hashes.tolist(), weights.tolist(), strict=True):
      features[h] = max(features.get(h, 0.0), w)
    pairs = _pair_hash(query_ids[:-1], query_ids[1:])
    both = pair_weight * np.minimum(weights[:-1], weights[1:])
    for h, w in zip(pairs.tolist(), both.tolist(), strict=True):
      features[h] = max(features.get(h, 0.0), w)
    kept = [(h, w) for h, w in features.items() if w > 0]
    self._hashes = np.array([h for h, _ in kept], np.uint32)
    # Integers in float64 add up exactly: bounds hold and ties are ties.
    self._weights = np.rint([_SCALE * w for _, w in kept]).astype(np.float64)

  def held(self, keys: UInt8[np.ndarray, "n bytes"]
           ) -> Bool[np.ndarray, "n F"]:
    """Which features each may hold; uint8 [n, key_dim of any level]."""
    bucket = self._hashes & np.uint32(8 * keys.shape[1] - 1)
    bits = keys[:, bucket >> 3] >> (bucket & 7).astype(np.uint8) & 1
    return bits.astype(bool)

  def __call__(self, keys: UInt8[np.ndarray, "n bytes"]
               ) -> Float64[np.ndarray, " n"]:
    """uint8 [n, key_dim of any level] -> float64 [n]."""
    return self.held(keys) @ self._weights / _SCALE


def scorer(query_ids: np.ndarray, weights: np.ndarray) -> LexicalScorer:
  """The `score_keys` of a search for a query's tokens."""
  return LexicalScorer(np.asarray(query_ids), np.asarray(weights, np.float64))
