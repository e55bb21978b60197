"""How likely the block that a query means lies below a node.

A bound tells what a node may hold at best. High up the tree nearly every node
may hold nearly every word, so bounds do not tell where to look first. What
tells is a feature of the query that a node holds and few others of its level.

A block that answers holds a share s of the query's features, and nothing is
known of s: every s in (0, 1) counts alike. If it lies below a node, the node
holds a feature with probability s + (1 - s) p, and else with p, the share of
nodes of that level that hold it, as counted in those read so far. The ratio of
the two, over all features and averaged over s, times the chance that a node of
its width has before it is looked at, are the odds (the binary independence
model of Robertson and Sparck Jones, 1976, at every level of the tree).
"""

from __future__ import annotations

from jaxtyping import Bool, Float64
import numpy as np

from mcjax.types import span_width

_SHARES = (np.arange(16) + 0.5) / 16  # s, for the average over (0, 1)


class Evidence:
  """Counts what nodes hold, and weighs nodes by it."""

  def __init__(self, blocks: int):
    """Args: blocks, of the history that is searched."""
    self._blocks = blocks
    self._nodes: dict[int, int] = {}
    self._holders: dict[int, np.ndarray] = {}
    self._weighed: dict[int, int] = {}

  def count(self, level: int, held: Bool[np.ndarray, "n F"]) -> bool:
    """Counts nodes of a level.

    Returns:
      Whether there are twice as many as when it last was so: then what was
      weighed before deserves to be weighed again.
    """
    nodes = self._nodes[level] = self._nodes.get(level, 0) + len(held)
    self._holders[level] = self._holders.get(level, 0) + held.sum(0)
    if nodes < 2 * self._weighed.get(level, 0):
      return False
    self._weighed[level] = nodes
    return True

  def log_odds(self, level: int, held: Bool[np.ndarray, "n F"]
               ) -> Float64[np.ndarray, " n"]:
    """Of nodes of a level that was counted, by the features they hold."""
    share = (self._holders[level] + 0.5) / (self._nodes[level] + 1)
    known = np.log1p(_SHARES[:, None] * (1 / share - 1))
    lacks = np.log1p(-_SHARES)
    each = held @ known.T + (~held).sum(1)[:, None] * lacks
    most = each.max(axis=1)
    ratio = most + np.log(np.exp(each - most[:, None]).mean(axis=1))
    return ratio - np.log(max(1.0, self._blocks / span_width(level - 1)))
