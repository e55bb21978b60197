"""Anytime best-first search of the tree for the blocks that answer a query."""

from __future__ import annotations

from collections.abc import Callable
import heapq
from typing import NamedTuple

import numpy as np

from mcjax.tree import learned_keys
from mcjax.tree import lexical_keys as lexical
from mcjax.tree.evidence import Evidence
from mcjax.tree.journal import wholly_inside
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, span_width

_LEVEL_DISCOUNT = 0.7  # of learned keys; 1, 0.9, 0.8 and 0.6 found fewer
_SCAN = 8192  # blocks of a brute-force chunk


class _Chunk(NamedTuple):
  """Siblings that are not yet read; the first of a heap is read next.

  Attributes:
    order: less is earlier.
    newest: minus the last block below; of two alike the newer is first.
    level, first, last: of the siblings.
    bound: of each of them.
    held: [F] the features that their parent holds; empty without features.
  """

  order: float
  newest: int
  level: int
  first: int
  last: int
  bound: float
  held: np.ndarray


class TreeSearch:
  """Finds the L1 blocks with the best keys, from the roots downwards.

  Nodes that are forgotten as a whole are no results. See `by_words` and
  `by_keys` for searches over lexical and over learned keys.

  The roots are the maximal complete nodes, at most 31 per level. A node's
  bound is the smallest score on the path to it, so it bounds every descendant.
  Which chunk of 32 siblings is read next is a question of its own: with
  `features` the one that most likely leads to the block that is meant, for
  each chunk on the way to it (`evidence`), else the one with the highest
  bound, discounted per level since a coarse bound is loose. A block's score is
  the bound of its own node. Work per `run` is bounded and does not depend on
  the length of the history.

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
    features: Callable[[np.ndarray], np.ndarray] | None = None,
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
      features: keys [n, width of the level] -> bool [n, F], what of the query
        each may hold.
      read_keys: keys of nodes [start, stop) of a level, from (level, start,
        stop): `tree.keys` by default, or `tree.lens_keys`.
      read_bytes: bytes behind the keys of so many nodes, from (level, nodes).
    """
    self._score_keys, self._features = score_keys, features
    self._read_keys, self._read_bytes = read_keys or tree.keys, read_bytes
    self._forgotten = tree.journal.forgotten
    self._k, self._floor = k, floor
    self._blocks = _blocks_before(tree, stop_block)
    self._evidence = Evidence(self._blocks)
    self.touched = 0
    self.bytes_read = 0
    # Two heaps, by what to read next and by bound; in the second one chunks
    # that were read meanwhile are skipped.
    self._frontier: list[_Chunk] = []
    self._bounds: list[tuple[float, int, int]] = []
    self._read: set[tuple[int, int]] = set()
    self._found: list[tuple[float, int]] = []  # (score, block)
    self._top: list[tuple[float, int]] = []  # the k best of them, a heap
    done = 0
    for level in range(tree.top_level, 0, -1):
      first, last = done // span_width(level - 1), self._nodes(level)
      if first < last:
        done = last * span_width(level - 1)
        self._push(-np.inf, np.inf, level, first, last, np.zeros(0, bool))

  def _nodes(self, level: int) -> int:
    return self._blocks // span_width(level - 1)

  def _push(self, order: float, bound: float, level: int, first: int,
            last: int, held: np.ndarray) -> None:
    newest = 1 - last * span_width(level - 1)
    chunk = _Chunk(order, newest, level, first, last, bound, held)
    heapq.heappush(self._frontier, chunk)
    heapq.heappush(self._bounds, (-bound, newest, level))

  def run(self, max_nodes: int) -> None:
    """Scores up to `max_nodes` more nodes, whole chunks of siblings.

    Stops early once the k best are certain. Raises: ValueError if `max_nodes`
    is less than one chunk of 32.
    """
    if max_nodes < BRANCHING:
      raise ValueError(f"max_nodes {max_nodes} is less than {BRANCHING}")
    while self._frontier and not self.certified:
      chunk = self._frontier[0]
      max_nodes -= chunk.last - chunk.first
      if max_nodes < 0:
        return
      heapq.heappop(self._frontier)
      self._read.add((chunk.newest, chunk.level))
      self._expand(chunk)

  def _expand(self, chunk: _Chunk) -> None:
    level, first, last = chunk.level, chunk.first, chunk.last
    keys = self._read_keys(level, first, last)
    self.touched += last - first
    self.bytes_read += self._read_bytes(level, last - first)
    scores = np.asarray(self._score_keys(keys), np.float64)
    scores = np.minimum(scores, chunk.bound)
    scores[wholly_inside(self._forgotten, level, first, last)] = -np.inf
    if level == 1:
      self._take(first, scores)
      return
    held = np.zeros((len(keys), 0), bool)
    if self._features is not None:
      held = self._features(keys)
      if self._evidence.count(level, held):
        self._weigh_again()
    orders = self._orders(level - 1, scores, held)
    for i in np.flatnonzero(scores > self._floor).tolist():
      start = (first + i) * BRANCHING
      self._push(float(orders[i]), float(scores[i]), level - 1, start,
                 start + BRANCHING, held[i])

  def _take(self, first: int, scores: np.ndarray) -> None:
    """Blocks from `first` on are results."""
    for block, score in enumerate(scores.tolist(), first):
      if score <= self._floor:
        continue
      self._found.append((score, block))
      if len(self._top) < self._k:
        heapq.heappush(self._top, (score, block))
      else:
        heapq.heappushpop(self._top, (score, block))

  def _orders(self, level: int, bounds: np.ndarray, held: np.ndarray
              ) -> np.ndarray:
    """Of chunks of a level, whose parents have these bounds and features."""
    if self._features is not None:  # chunks on the way: as many as the level
      return np.log(level) - self._evidence.log_odds(level + 1, held)
    discount = _LEVEL_DISCOUNT**level
    return np.where(bounds > 0, -bounds * discount, -bounds / discount)

  def _weigh_again(self) -> None:
    """Puts the frontier in order by what is counted now."""
    chunks = [c for c in self._frontier if np.isfinite(c.bound)]
    kept = [c for c in self._frontier if not np.isfinite(c.bound)]
    for level in {c.level for c in chunks}:
      same = [c for c in chunks if c.level == level]
      held = np.stack([c.held for c in same])
      orders = self._orders(level, np.array([c.bound for c in same]), held)
      kept += [c._replace(order=o)
               for c, o in zip(same, orders.tolist(), strict=True)]
    self._frontier = kept
    heapq.heapify(self._frontier)

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


def by_words(
  tree: MegaContextTree, token_ids: np.ndarray, weights: np.ndarray, *,
  k: int = 16, stop_block: int | None = None,
) -> TreeSearch:
  """A search for the blocks that hold most of a query's tokens, by weight.

  Args:
    tree: the history.
    token_ids: int [Q].
    weights: float [Q], zero or more.
    k, stop_block: see `TreeSearch`.
  """
  scorer = lexical.scorer(token_ids, weights)
  return TreeSearch(
    tree, scorer, k=k, stop_block=stop_block, features=scorer.held)


def by_keys(
  tree: MegaContextTree, query: np.ndarray, *, k: int = 16,
  stop_block: int | None = None,
) -> TreeSearch:
  """A search for the blocks with the largest inner product with a query.

  Args:
    tree: the history; it keeps learned keys.
    query: int [K], see `learned_keys.quantise`.
    k, stop_block: see `TreeSearch`.
  """
  width = len(query)
  return TreeSearch(
    tree, learned_keys.scorer(query), k=k, stop_block=stop_block,
    floor=-np.inf, read_keys=tree.lens_keys,
    read_bytes=lambda level, n: n * learned_keys.key_width(level, width))


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
