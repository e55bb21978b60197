"""Focus by words alone: the plain lexical control, and the fallback of LensNet.

A best-first search over the tree's lexical keys finds candidate blocks anywhere
in the history, within `max_nodes` nodes per step; it goes on where it stopped
while the query stays the same. The share of the query's words that a block and
its neighbours hold, weighted by rarity and case-folded, ranks them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcjax.answer.matching import MARKS, Matcher, QueryWords
from mcjax.answer.reading import Reader
from mcjax.answer.words import WordTable
from mcjax.focus.policy import WISH, HostPolicy, age_scores, with_payment
from mcjax.tree.journal import touched
from mcjax.tree.search import TreeSearch, by_words
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM
from mcjax.window.focus_view import FocusView

_RIVAL = 0.6  # share of the best block's that another must hold


class Similarity(HostPolicy):
  """Asks for the blocks that hold most of the query's words."""

  def __init__(self, max_nodes: int, spans: int = 8, read_tokens: int = 256):
    self._max_nodes, self._spans = max_nodes, spans
    self._read_tokens = read_tokens
    self._tree: MegaContextTree | None = None
    self._query_ids: np.ndarray | None = None  # by identity: a new one searches
    self._blocks = 0
    self._search: TreeSearch | None = None
    self._targets: list[tuple[int, float]] = []
    self.touched = 0
    self.bytes_read = 0
    self.answerable = 0.0

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score per entry, [E] float32."""
    scores = age_scores(view)
    e, starts = view.entries, view.entries.start()
    for block, strength in self.targets(view):
      token = block * BRANCHING
      at = int(np.searchsorted(starts, token, side="right")) - 1
      stop = at + BRANCHING if e.level[at] == 0 else at + 1
      scores[at:stop] = np.maximum(scores[at:stop], strength)
    return with_payment(view, scores)

  def targets(self, view: FocusView) -> list[tuple[int, float]]:
    """(L1 block, strength in (0.2, 1]) of what the query asks for, best first.

    Sets `answerable` too.
    """
    self._prepare(view)
    self._targets, self.answerable = [], 0.0
    self.touched = self.bytes_read = 0
    if self._search is None:
      return []
    before = self._search.touched, self._search.bytes_read
    self._search.run(self._max_nodes)
    self.touched = self._search.touched - before[0]
    self.bytes_read = self._search.bytes_read - before[1]
    ranked = self._ranked(view, self._search)
    top = ranked[0][1] if ranked else 0.0
    self.answerable = float(top * self._query.known) if view.asked else 0.0
    found: dict[int, float] = {}
    last = view.query_start // BRANCHING
    for block, share in ranked:
      if share < max(_RIVAL * top, 1e-3):
        continue
      for near, part in ((block, 1.0), (block + 1, 0.9), (block - 1, 0.9)):
        if 0 <= near < last:
          strength = WISH + (1 - WISH) * share * part
          found[near] = max(found.get(near, 0.0), strength)
    self._targets = sorted(found.items(), key=lambda item: -item[1])
    return self._targets

  @property
  def sources(self) -> Sequence[tuple[int, int]]:
    """Token spans of the sentences that hold the prompt's words."""
    if not self._asked or not self._targets:
      return ()
    return self._reader.spans(
      [(block, 1.0) for block, _ in self._targets], self._query,
      self._read_tokens, self._stop, _RIVAL)

  def _ranked(self, view: FocusView, search: TreeSearch
              ) -> list[tuple[int, float]]:
    """The best few blocks found, by the share of the query that they hold."""
    last = view.query_start // BRANCHING
    found = np.array(sorted(
      b for b, _ in search.best(4 * self._spans) if b < last), np.int64)
    found = found[~touched(view.tree.journal.forgotten, found)]
    if not len(found):
      return []
    around = self._matcher.blocks_around(found, last)
    held = self._matcher.match(around, self._query).exact
    place = np.searchsorted(around, found)
    padded = np.concatenate([held, np.zeros_like(held[:1])])
    beside = np.maximum(padded[place - 1] * (found > 0)[:, None],
                        padded[np.minimum(place + 1, len(around))])
    share = (held[place] + np.maximum(held[place], beside)) / 2
    weights = self._query.weights
    share = share @ weights / (weights.sum() + 1e-6)
    asks = self._matcher.marks(found)[:, MARKS.index("question_mark")]
    share = share * (1 - asks / 2)  # an earlier question is no answer
    order = np.lexsort([-found, -share])[: self._spans]
    return [(int(found[i]), float(share[i])) for i in order]

  def take_in(self, tree: MegaContextTree, context: ContextLM) -> None:
    """Counts words; else the first prompt would."""
    self._turn_to(tree, context)
    self._matcher.count_words()

  def _turn_to(self, tree: MegaContextTree, context: ContextLM) -> None:
    """Begins anew for another history."""
    if tree is self._tree:
      return
    tokenizer = context.lm.tokenizer
    none = np.zeros((tree.vocab_size, 1), np.float32)
    self._tree, self._query_ids = tree, None
    self._matcher = Matcher(tree, WordTable(tokenizer, none, none[:, 0]))
    self._reader = Reader(tree, tokenizer, self._matcher)

  def _prepare(self, view: FocusView) -> None:
    """Starts a search; the words of a query stay as first seen."""
    self._turn_to(view.tree, view.context_lm)
    self._asked, self._stop = view.asked, view.query_start
    blocks = view.tree.num_nodes(1)
    if view.query_ids is self._query_ids and blocks == self._blocks:
      return
    if view.query_ids is not self._query_ids:
      self._query: QueryWords = self._matcher.query(
        view.query_ids, view.query_weights,
        view.query_start // BRANCHING if view.asked else None)
    self._query_ids, self._blocks, self._search = view.query_ids, blocks, None
    weights = self._query.token_weights
    if np.any(weights > 0) and view.query_start >= BRANCHING:
      self._search = by_words(
        view.tree, self._query.token_ids, weights,
        stop_block=view.query_start // BRANCHING)
