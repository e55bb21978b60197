"""Anytime best-first search of the tree for the blocks that answer a query."""

from __future__ import annotations

from collections.abc import Callable
import heapq

import numpy as np

from mcjax.tree import lexical_keys as lexical
from mcjax.tree.journal import wholly_inside
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, span_width

_LEVEL_DISCOUNT = 0.7  # 1, 0.9, 0.8 and 0.6 found fewer within 256 nodes
_SCAN = 8192  # blocks of a brute-force chunk


class TreeSearch:
  """Finds the L1 blocks with the best keys, from the roots downwards.

  Nodes that are forgotten as a whole are no results.

  Searches lexical keys, or learned keys with their `read_keys` and a `floor` of
  -inf, since their scores may be negative.

  The roots are the maximal complete nodes, at most 31 per level. A node's
  bound is the smallest score on the path to it, so it bounds every descendant.
  The next node to expand is the one with the highest bound, discounted per
  level since a coarse bound is loose; its 32 children are read as one chunk. A
  block's score is the bound of its own node. Work per `run` is bounded and does
  not depend on the length of the history.

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
    read_keys: Callable[[int, int, int], np.ndarray] | None = None,
    read_bytes: Callable[[int, int], int] = lexical.key_read_bytes,
  ):
    """Prepares a search of the blocks that are complete now.

    Args:
      tree: the history; it may grow meanwhile, newer blocks are not seen.
      score_keys: keys [n, width of the level] -> [n]; a parent's score must
        not be below a child's, up to the hash collisions of the child's key.
      k: blocks to certify before `run` stops early.
      stop_block: only blocks before this one.
      floor: blocks that score no more than this are no results.
      read_keys: keys of nodes [start, stop) of a level, from (level, start,
        stop): `tree.keys` by default, or `tree.lens_keys`.
      read_bytes: bytes behind the keys of so many nodes, from (level, nodes).
    """
    self._score_keys = score_keys
    self._read_keys, self._read_bytes = read_keys or tree.keys, read_bytes
    self._forgotten = tree.journal.forgotten
    self._k, self._floor = k, floor
    self._blocks = _blocks_before(tree, stop_block)
    self.touched = 0
    self.bytes_read = 0
    # Chunks of siblings not yet read, as heaps: by what to read next, and by
    # bound, where those read meanwhile are skipped.
    self._frontier: list[tuple[float, int, int, int, int, float]] = []
    self._bounds: list[tuple[float, int, int]] = []
    self._read: set[tuple[int, int]] = set()
    self._found: list[tuple[float, int]] = []  # (score, block)
    self._top: list[tuple[float, int]] = []  # the k best of them, a heap
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
    discount = _LEVEL_DISCOUNT**level
    urgency = bound * discount if bound > 0 else bound / discount
    chunk = (-urgency, -newest, level, first, last, bound)
    heapq.heappush(self._frontier, chunk)
    heapq.heappush(self._bounds, (-bound, -newest, level))

  def run(self, max_nodes: int) -> None:
    """Scores up to `max_nodes` more nodes, whole chunks of siblings.

    Stops early once the k best are certain. Raises: ValueError if `max_nodes`
    is less than one chunk of 32.
    """
    if max_nodes < BRANCHING:
      raise ValueError(f"max_nodes {max_nodes} is less than {BRANCHING}")
    while self._frontier and not self.certified:
      _, newest, level, first, last, bound = self._frontier[0]
      max_nodes -= last - first
      if max_nodes < 0:
        return
      heapq.heappop(self._frontier)
      self._read.add((newest, level))
      self._expand(bound, level, first, last)

  def _expand(self, bound: float, level: int, first: int, last: int) -> None:
    keys = self._read_keys(level, first, last)
    self.touched += last - first
    self.bytes_read += self._read_bytes(level, last - first)
    scores = np.minimum(np.asarray(self._score_keys(keys), np.float64), bound)
    scores[wholly_inside(self._forgotten, level, first, last)] = -np.inf
    for index, score in zip(range(first, last), scores.tolist(), strict=True):
      if score <= self._floor:
        continue
      if level == 1:
        self._found.append((score, index))
        if len(self._top) < self._k:
          heapq.heappush(self._top, (score, index))
        else:
          heapq.heappushpop(self._top, (score, index))
      else:
        start = index * BRANCHING
        self._push(score, level - 1, start, start + BRANCHING)

  def widen(self, k: int) -> None:
    """Goes on until the `k` best are certain, more than before."""
    self._k = k
    self._top = heapq.nlargest(k, self._found)
    heapq.heapify(self._top)

  @property
  def certified(self) -> bool:
    """Whether `best(k)` is exactly that of all blocks."""
    while self._bounds and self._bounds[0][1:] in self._read:
      heapq.heappop(self._bounds)
    if not self._bounds:
      return True
    if len(self._top) < self._k:
      return False
    score, block = self._top[0]
    return (-score, -block) <= self._bounds[0][:2]

  def best(self, k: int) -> list[tuple[int, float]]:
    """Up to k (block, score) found so far; best first, ties newer first."""
    return [(b, s) for s, b in heapq.nlargest(k, self._found)]


def brute_force(
  tree: MegaContextTree,
  score_keys: Callable[[np.ndarray], np.ndarray],
  *,
  k: int = 16,
  stop_block: int | None = None,
) -> list[tuple[int, float]]:
  """The best blocks by their learned keys, all of which are read, in chunks.

  Args:
    tree: the history.
    score_keys: int8 [n, K] -> [n].
    k: blocks wanted.
    stop_block: only blocks before this one.

  Returns:
    Up to k (block, score); best first, ties newer first.

  Raises:
    McjaxError: the tree keeps no learned keys.
  """
  blocks, scores = np.zeros(0, np.int64), np.zeros(0)
  stop = _blocks_before(tree, stop_block)
  for start in range(0, stop, _SCAN):
    end = min(start + _SCAN, stop)
    new = np.asarray(score_keys(tree.lens_keys(1, start, end)), np.float64)
    kept = ~wholly_inside(tree.journal.forgotten, 1, start, end)
    blocks = np.concatenate([blocks, np.arange(start, end)[kept]])
    scores = np.concatenate([scores, new[kept]])
    best = np.lexsort([-blocks, -scores])[:k]
    blocks, scores = blocks[best], scores[best]
  return list(zip(blocks.tolist(), scores.tolist(), strict=True))


def _blocks_before(tree: MegaContextTree, stop_block: int | None) -> int:
  """Complete blocks, only those before `stop_block` if it is given."""
  blocks = tree.num_nodes(1)
  return blocks if stop_block is None else max(0, min(blocks, stop_block))
