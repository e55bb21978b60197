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

from collections.abc import Iterable, Mapping
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
_UNWELCOME = -0.3  # of what was brought in and does harm
_HARM = 0.01  # nats a token that it may cost, smoothed over two steps or so
_PAUSE = 8  # refocus steps without a wish after that, the first time
_GIST_WORTH = 0.006  # of a gist; twice that of raw text from farther back
_NEAR_WORTH = 0.17  # what the newest raw block scores above that
_NEAR_HALF = 256.0  # tokens over which that is halved


def newest_raw(entries: Entries) -> int:
  """The first entry of the raw text that reaches up to the cursor."""
  coarse = np.flatnonzero(entries.level > 0)
  return int(coarse[-1]) + 1 if len(coarse) else 0


def _brought(entries: Entries) -> np.ndarray:
  """[E] bool raw entries from farther back that an expand brought in."""
  out = (entries.level == 0) & (entries.action == EXPAND)
  out[newest_raw(entries) :] = False
  return out


def _costs(entries: Entries, blocks: Iterable[int]
           ) -> dict[int, tuple[float, float]]:
  """{block: slots that it takes to show it raw, and to open what is above}."""
  starts, out = entries.start(), {}
  for block in blocks:
    at = int(np.searchsorted(starts, block * BRANCHING, side="right")) - 1
    level = int(entries.level[at])
    out[block] = (_COST * (_THERE if level == 0 else 1.0),
                  _COST * (_THERE if level <= 1 else level - 1.0))
  return out


class Novelty:
  """Finds what the window lacks of the newest text, anywhere in the history.

  A best-first search over the tree's lexical keys, each call's within
  `max_nodes` nodes, for words that the newest raw text does not hold before the
  query; true tokens rank what it finds.

  What was brought in can also mislead: a passage much like the one that is
  read makes the LM copy from it. So where the LM has read on since, the newest
  block is run again with and without it. What makes the block less likely has
  to go, and nothing is wished for during the next steps, twice as many each
  time.

  Attributes:
    touched, bytes_read: nodes and bytes of the last call's search.
    unwelcome: what was brought in does harm and shall go.
  """

  def __init__(self, max_nodes: int):
    self._max_nodes = max_nodes
    self._gain = 0.0  # nats a token, of what was brought in, smoothed
    self._pause = _PAUSE
    self._resume = 0  # refocus step from which wishes are made again
    self._step = 0  # the last one
    self.unwelcome = False
    self.touched = 0
    self.bytes_read = 0

  def wishes(self, view: FocusView) -> dict[int, float]:
    """{block: its share, in (0, 1], of the query's weight} of wished blocks.

    Chosen one after the other by share less the price of the slots that it
    takes to show the block raw, of which those below a coarse entry that is
    open anyway are free.
    """
    self.touched = self.bytes_read = 0
    self._judge(view)
    if self.unwelcome:
      return {}
    shares = self._shares(view)
    if not shares:
      return {}
    costs = _costs(view.entries, shares)
    starts = view.entries.start()
    newest = int(starts[newest_raw(view.entries)]) // BRANCHING
    opened, chosen = {newest // BRANCHING}, {}

    def value(block: int) -> float:
      own, above = costs[block]
      slots = own + (0 if block // BRANCHING in opened else above)
      return shares[block] - _SLOT_PRICE * slots

    while shares and len(chosen) < WISHES:
      best = max(shares, key=value)
      if value(best) <= 0:
        break
      chosen[best] = shares.pop(best)
      opened.add(best // BRANCHING)
    return chosen

  def _judge(self, view: FocusView) -> None:
    """Measures what was brought in; sets `unwelcome`."""
    if view.step < self._step:  # a history undone, or another one
      self._gain, self._pause, self._resume = 0.0, _PAUSE, 0
    self._step = view.step
    if self.unwelcome and view.step >= self._resume:
      self._gain = 0.0
    self.unwelcome = view.step < self._resume
    brought, context = _brought(view.entries), view.context_lm
    if self.unwelcome or not brought.any() or not context.is_synced:
      return
    cursor = view.tree.cursor
    newest = view.tree.tokens(max(0, cursor - BRANCHING), cursor)
    change = context.probe_nll(newest, brought) - context.probe_nll(newest)
    self._gain = (self._gain + float(np.nanmean(change))) / 2
    if self._gain < -_HARM:
      self.unwelcome = True
      self._resume = view.step + self._pause
      self._pause *= 2

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
    brought = _brought(entries)
    pinned = (entries.level[:first] == 0) & ~brought[:first]
    blocks = {b for b, _ in search.best(_FOUND)}
    blocks |= set((entries.index[brought] // BRANCHING).tolist())
    blocks -= set((entries.index[:first][pinned] // BRANCHING).tolist())
    ranked = lexical.rank_blocks(
      tree, sorted(blocks), view.query_ids, weights)
    return {b: share * novel / total for b, share in ranked if share > 0}


def reading_scores(view: FocusView, wishes: Mapping[int, float],
                   unwelcome: bool = False) -> np.ndarray:
  """Signed scores [E] float32 of a window while text is read on.

  Args:
    view: the policy's.
    wishes: {block: what it is wished for by, in (0, 1]}.
    unwelcome: what was brought in shall go.
  """
  entries = view.entries
  starts, first = entries.start(), newest_raw(view.entries)
  out = np.zeros(len(entries), np.float32)
  raw = entries.level == 0
  out[entries.level == 1] = _GIST_WORTH
  out[raw] = 2 * _GIST_WORTH
  near = np.arange(first, len(entries))
  age = view.tree.cursor - (starts[near] // BRANCHING + 1) * BRANCHING
  age = np.maximum(age, 0)  # of the block that is not complete
  out[near] = 3 * _GIST_WORTH + _NEAR_WORTH * np.exp2(-age / _NEAR_HALF)
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
  if unwelcome:
    out[_brought(entries)] = _UNWELCOME
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
