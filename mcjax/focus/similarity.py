"""Focus by words: tree search for the rare tokens shared with the query."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mcjax.answer import passages, questions
from mcjax.answer.passages import Passage
from mcjax.focus.policy import HostPolicy, age_scores
from mcjax.tree import lexical_keys as lexical
from mcjax.tree import lexical_rank
from mcjax.tree.search import TreeSearch
from mcjax.types import BRANCHING
from mcjax.window.focus_view import FocusView
from mcjax.window.working_context import EXPAND

_RIVAL = 0.6  # share of the best span's coverage that a span must reach
_LOOKUP = 0.55  # strength from which a question is about one place


class Similarity(HostPolicy):
  """Tree search by token statistics: rare tokens shared with the query.

  A best-first search over the tree's lexical keys finds candidate blocks
  anywhere in the history within `max_nodes` nodes per step (it continues
  where it stopped while the query stays the same); the candidates' true
  tokens rank them. Entries above a found block ask to be expanded; found
  spans no longer asked for ask to be collapsed. When one place answers a
  question well, other raw text asks to be collapsed too: a small model is
  easily distracted by it.
  """

  def __init__(self, max_nodes: int, spans: int = 4):
    self._max_nodes = max_nodes
    self._spans = spans
    self._query: np.ndarray | None = None  # by identity: a new one searches
    self._blocks = 0
    self._search: TreeSearch | None = None
    self._weights = np.zeros(0, np.float32)
    self._reader: passages.PassageReader | None = None
    self.touched = 0
    self.bytes_read = 0

  def score(self, view: FocusView) -> np.ndarray:
    scores = age_scores(view)
    e = view.entries
    stale = (e.level == 0) & (e.action == EXPAND)
    scores[stale] = np.minimum(scores[stale], -0.5)
    starts = e.start()
    targets = self.targets(view)
    if self.sources:
      raw = (e.level == 0) & (starts < view.query_start)
      scores[raw] = np.minimum(scores[raw], -0.3)
    for block, strength in targets:
      token = block * BRANCHING
      at = int(np.searchsorted(starts, token, side="right")) - 1
      stop = at + BRANCHING if e.level[at] == 0 else at + 1
      scores[at:stop] = np.maximum(scores[at:stop], strength)
    return scores

  def targets(self, view: FocusView) -> list[tuple[int, float]]:
    """(L1 block, strength in (0.2, 1]) of the spans the query asks for.

    Sets `sources` too.
    """
    self._prepare(view)
    self.sources = ()
    search = self._search
    if search is None:
      return []
    before = search.touched, search.bytes_read
    strengths, answers = (
      self._of_question(view, search) if view.asked
      else (self._of_text(view, search), {}))
    self.touched = search.touched - before[0]
    self.bytes_read = search.bytes_read - before[1]
    last = view.query_start // BRANCHING
    least = _RIVAL * max(strengths.values(), default=0.0)
    found: dict[int, float] = {}
    for block, share in strengths.items():
      if share < least:
        continue
      for near, factor in _around(block, answers.get(block)).items():
        strength = factor * min(1.0, 0.25 + share)
        if 0 <= near < last and strength > 0.2:
          found[near] = max(found.get(near, 0.0), strength)
    if (answers and max(found.values(), default=0.0) >= _LOOKUP
        and questions.reads_alone(view, answers)):
      self.sources = passages.spans(answers.values())
    return sorted(found.items(), key=lambda item: -item[1])

  def candidates(self) -> list[int]:
    """Blocks that the search has found, best first, before true tokens rank."""
    if self._search is None:
      return []
    return [b for b, _ in self._search.best(4 * self._spans)]

  def passages(self, view: FocusView, blocks: Iterable[int]
               ) -> dict[int, Passage]:
    """What blocks say on the question of the last call of `targets`."""
    if self._reader is None:
      self._reader = passages.PassageReader(
        view.tree, view.context_lm.lm.tokenizer, view.query_ids,
        self._weights, view.query_start)
    return self._reader.find(blocks)

  def _of_text(self, view: FocusView, search: TreeSearch
               ) -> dict[int, float]:
    """{block: share of the query that it holds}, the best few."""
    search.run(self._max_nodes)
    ranked = lexical_rank.rank_blocks(
      view.tree, self.candidates(), view.query_ids, self._weights)
    return dict(ranked[: self._spans])

  def _of_question(self, view: FocusView, search: TreeSearch
                   ) -> tuple[dict[int, float], dict[int, Passage]]:
    """As `_of_text`, of single sentences, and {block: its sentence}.

    A question that was asked before is no result, so within the nodes of a
    step the search goes on until it has found something else.
    """
    count = 4 * self._spans
    stop = search.touched + self._max_nodes
    while True:
      if stop - search.touched >= BRANCHING:
        search.run(stop - search.touched)
      blocks = [b for b, _ in search.best(count)]
      told = passages.statements(self.passages(view, blocks))
      if len(told) >= self._spans or len(blocks) < count:
        break
      count *= 2
      search.widen(count)
    best = passages.best_sentences(told, self._spans)
    return {block: p.share for block, p in best.items()}, best

  def _prepare(self, view: FocusView) -> None:
    """Starts a search; words and passages of a query stay as first seen."""
    blocks = view.tree.num_nodes(1)
    if view.query_ids is not self._query:
      self._query, self._reader = view.query_ids, None
      self._weights = lexical_rank.query_weights(
        view.tree, view.query_ids, view.query_weights
      )
    elif blocks == self._blocks:
      return
    self._blocks = blocks
    self.touched = self.bytes_read = 0
    if not np.any(self._weights > 0) or view.query_start < BRANCHING:
      self._search = None
      return
    self._search = TreeSearch(
      view.tree, lexical.scorer(view.query_ids, self._weights),
      stop_block=view.query_start // BRANCHING,
    )


def _around(block: int, answer: Passage | None) -> dict[int, float]:
  """{block: share in what `block` is worth}: it and others beside it.

  For a question those that the answering sentence touches.
  """
  if answer is None:
    return {block: 1.0, block + 1: 0.9, block - 1: 0.8}
  return {near: 1.0 if near == block else 0.9 for near in answer.blocks}
