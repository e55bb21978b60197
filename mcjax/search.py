"""Anytime best-first search of the tree for the blocks that answer a query."""

from __future__ import annotations

from collections.abc import Callable
import heapq

import numpy as np

from mcjax import keys as lexical
from mcjax.tree import MegaContextTree
from mcjax.types import BRANCHING, span_width


class TreeSearch:
  """Finds the L1 blocks with the best keys, from the roots downwards.

  The roots are the maximal complete nodes, at most 31 per level. A node's
  bound is the smallest score on the path to it, so it bounds every descendant;
  the node with the highest bound is expanded next, its 32 children read as
  one chunk. A block's score is the bound of its own node. Work per `run` is
  bounded and does not depend on the length of the history.

  Attributes:
    touched: nodes scored so far.
    bytes_read: bytes of keys (of tokens, at level 1) read so far.
  """

  def __init__(
    self,
    tree: MegaContextTree,
    score_keys: Callable[[np.ndarray], np.ndarray],
    *,
    k: int = 16,
    stop_block: int | None = None,
    floor: float = 0.0,
  ):
    """Prepares a search of the blocks that are complete now.

    Args:
      tree: the history; it may grow meanwhile, newer blocks are not seen.
      score_keys: uint8 [n, key_dim(level)] -> [n]; a parent's score must not
        be below a child's, up to the hash collisions of the child's key.
      k: blocks to certify before `run` stops early.
      stop_block: only blocks before this one.
      floor: blocks that score no more than this are no results.
    """
    self._tree, self._score_keys = tree, score_keys
    self._k, self._floor = k, floor
    self._blocks = tree.num_nodes(1)
    if stop_block is not None:
      self._blocks = max(0, min(self._blocks, stop_block))
    self.touched = 0
    self.bytes_read = 0
    # Heap of (-bound, -newest block, level of the children, first, last + 1).
    self._frontier: list[tuple[float, int, int, int, int]] = []
    self._found: list[tuple[float, int]] = []  # (score, block)
    done = 0
    for level in range(tree.top_level, 0, -1):
      first, last = done // span_width(level - 1), self._nodes(level)
      if first < last:
        done = last * span_width(level - 1)
        self._push(np.inf, level, first, last)

  def _nodes(self, level: int) -> int:
    return self._blocks // span_width(level - 1)

  def _push(self, bound: float, level: int, first: int, last: int) -> None:
    newest = last * span_width(level - 1) - 1
    heapq.heappush(self._frontier, (-bound, -newest, level, first, last))

  def run(self, max_nodes: int) -> None:
    """Scores up to `max_nodes` more nodes, whole chunks of siblings.

    Stops early once the k best are certain. Raises: ValueError if `max_nodes`
    is less than one chunk of 32.
    """
    if max_nodes < BRANCHING:
      raise ValueError(f"max_nodes {max_nodes} is less than {BRANCHING}")
    while self._frontier and not self.certified:
      _, _, level, first, last = self._frontier[0]
      max_nodes -= last - first
      if max_nodes < 0:
        return
      bound = -heapq.heappop(self._frontier)[0]
      self._expand(bound, level, first, last)

  def _expand(self, bound: float, level: int, first: int, last: int) -> None:
    keys = self._tree.keys(level, first, last)
    self.touched += last - first
    self.bytes_read += lexical.key_read_bytes(level, last - first)
    scores = np.minimum(np.asarray(self._score_keys(keys), np.float64), bound)
    for index, score in zip(range(first, last), scores.tolist(), strict=True):
      if score <= self._floor:
        continue
      if level == 1:
        self._found.append((score, index))
      else:
        start = index * BRANCHING
        self._push(score, level - 1, start, start + BRANCHING)

  @property
  def certified(self) -> bool:
    """Whether `best(k)` is exactly that of all blocks."""
    if not self._frontier:
      return True
    best = self.best(self._k)
    if len(best) < self._k:
      return False
    block, score = best[-1]
    return (-score, -block) <= self._frontier[0][:2]

  def best(self, k: int) -> list[tuple[int, float]]:
    """Up to k (block, score) found so far; best first, ties newer first."""
    return [(b, s) for s, b in heapq.nlargest(k, self._found)]
