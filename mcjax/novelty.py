"""Focus while text is read on: far blocks that add to the newest text.

What a block of plain text is worth for the next tokens can hardly be foreseen
with one exception: rare words of the newest text that a block far back holds
and the raw text between does not. A name that comes up again, a function
called far from where it was written. Such blocks are wished for as far as what
they share is worth the slots. All else moves only to make room, least worth
first: gists, which the LM does not see; raw blocks from farther back; then the
newest raw text, oldest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mcjax import keys as lexical
from mcjax.search import TreeSearch
from mcjax.types import BRANCHING
from mcjax.working_context import EXPAND, Entries

if TYPE_CHECKING:
  from mcjax.policies import FocusView

WISHES = 4  # blocks wished for at one time
_EDITS = 4  # a step, of which every second one pays
_COST = BRANCHING - 1  # slots of an expand
_THRESHOLD = 0.2  # as the allocator's; scores below it are no wishes
_FOUND = 16  # blocks taken from a search
_THERE = 0.5  # of its price for slots that a block has already
_SLOT_PRICE = 0.001  # share of the query that a slot must bring
_KEPT = 0.19  # of a gist beside one that is wished for
_GIST_WORTH = 0.01  # most that a block behind a gist scores without a wish
_NEAR_WORTH = 0.17  # what the newest raw block scores above that
_NEAR_HALF = 256.0  # tokens over which that is halved


def newest_raw(entries: Entries) -> int:
  """The first entry of the raw text that reaches up to the cursor."""
  coarse = np.flatnonzero(entries.level > 0)
  return int(coarse[-1]) + 1 if len(coarse) else 0


class Novelty:
  """Finds what the window lacks of the newest text, anywhere in the history.

  A best-first search over the tree's lexical keys, each call's within
  `max_nodes` nodes, for words that the newest raw text does not hold before the
  query; true tokens rank what it finds.

  Attributes:
    touched, bytes_read: nodes and bytes of the last call's search.
  """

  def __init__(self, max_nodes: int):
    self._max_nodes = max_nodes
    self.touched = 0
    self.bytes_read = 0

  def wishes(self, view: FocusView) -> dict[int, float]:
    """{block: its share, in (0, 1], of the query's weight} of wished blocks.

    Chosen one after the other by share less the price of the slots that it
    takes to show the block raw; a block that is raw already takes none, one
    below a coarse entry that is opened for another takes fewer.
    """
    self.touched = self.bytes_read = 0
    shares = self._shares(view)
    entries, chosen = view.entries, {}
    starts = entries.start()
    newest = int(starts[newest_raw(entries)]) // BRANCHING if shares else 0
    open_anyway = newest // BRANCHING
    opened = {open_anyway}
    costs = {}
    for block in shares:
      at = int(np.searchsorted(starts, block * BRANCHING, side="right")) - 1
      level = int(entries.level[at])
      costs[block] = (
        _COST * (_THERE if level == 0 else 1.0),
        _COST * (_THERE if level <= 1 else level - 1.0))
    while shares and len(chosen) < WISHES:
      def value(block):
        own, above = costs[block]
        slots = own + (0 if block // BRANCHING in opened else above)
        return shares[block] - _SLOT_PRICE * slots
      best = max(shares, key=value)
      if value(best) <= 0:
        break
      chosen[best] = shares.pop(best)
      opened.add(best // BRANCHING)
    return chosen

  def _shares(self, view: FocusView) -> dict[int, float]:
    """{block: share of the query's weight} of blocks that hold novel words."""
    entries, tree = view.entries, view.tree
    first = newest_raw(entries)
    if first in (0, len(entries)) or not len(view.query_ids):
      return {}
    start = int(entries.start()[first])
    near = tree.tokens(start, max(start, view.query_start))
    weights = lexical.query_weights(tree, view.query_ids, view.query_weights)
    total = float(weights.sum())
    weights[np.isin(view.query_ids, near)] = 0.0
    novel = float(weights.sum())
    if not novel:
      return {}
    search = TreeSearch(
      tree, lexical.scorer(view.query_ids, weights), k=_FOUND,
      stop_block=start // BRANCHING)
    search.run(self._max_nodes)
    self.touched, self.bytes_read = search.touched, search.bytes_read
    pinned = np.flatnonzero(
      (entries.level[:first] == 0) & (entries.action[:first] != EXPAND))
    brought = np.flatnonzero(
      (entries.level[:first] == 0) & (entries.action[:first] == EXPAND))
    blocks = {b for b, _ in search.best(_FOUND)}
    blocks |= set((entries.index[brought] // BRANCHING).tolist())
    blocks -= set((entries.index[pinned] // BRANCHING).tolist())
    ranked = lexical.rank_blocks(
      tree, sorted(blocks), view.query_ids, weights)
    return {b: share * novel / total for b, share in ranked if share > 0}


def reading_scores(view: FocusView, wishes: Mapping[int, float],
                   gist_worth: Mapping[int, float] = {}) -> np.ndarray:
  """Signed scores [E] float32 of a window while text is read on.

  Args:
    view: the policy's.
    wishes: {block: what it is wished for by, in (0, 1]}.
    gist_worth: {block: in [0, 1]}, which gists to give up first: the least.
  """
  entries = view.entries
  starts, first = entries.start(), newest_raw(view.entries)
  out = np.zeros(len(entries), np.float32)
  raw = entries.level == 0
  out[raw] = _GIST_WORTH * 1.5
  near = np.flatnonzero(raw)[np.flatnonzero(raw) >= first]
  age = view.tree.cursor - (starts[near] // BRANCHING + 1) * BRANCHING
  age = np.maximum(age, 0)  # of the block that is not complete
  out[near] = 2 * _GIST_WORTH + _NEAR_WORTH * np.exp2(-age / _NEAR_HALF)
  for at in np.flatnonzero(entries.level == 1).tolist():
    out[at] = _GIST_WORTH * gist_worth.get(int(entries.index[at]), 0.5)
  places = np.searchsorted(
    starts, np.fromiter(wishes, np.int64) * BRANCHING, side="right") - 1
  for at in places[~raw[places]].tolist():
    siblings = (entries.level == entries.level[at]) & (
      entries.index // BRANCHING == entries.index[at] // BRANCHING)
    out[siblings] = _KEPT  # a collapse would bury it again
  for at, share in zip(places.tolist(), wishes.values()):
    stop = at + BRANCHING if raw[at] else at + 1
    out[at:stop] = np.maximum(out[at:stop], min(1.0, _THRESHOLD + share))
  _pay(view, out)
  return out


def _pay(view: FocusView, scores: np.ndarray) -> None:
  """Offers the groups worth least, as many as the wishes cost."""
  hidden = view.entries.level > 0
  granted = min(_EDITS // 2, int(np.sum(hidden & (scores > _THRESHOLD))))
  if not granted or view.collapsible is None:
    return
  lacking = BRANCHING + granted * _COST - view.context_lm.window.free
  groups = np.flatnonzero(view.collapsible)
  sums = np.concatenate([[0.0], np.cumsum(scores)])
  worth = (sums[groups + BRANCHING] - sums[groups]) / BRANCHING
  for row in np.argsort(worth, kind="stable")[: max(0, -(-lacking // _COST))]:
    if worth[row] < _KEPT:
      at = int(groups[row])
      scores[at : at + BRANCHING] = np.minimum(
        scores[at : at + BRANCHING], -_THRESHOLD - 0.01)
