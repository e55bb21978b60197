"""Which sentences the LM reads for an answer.

A policy says which blocks hold an answer. Blocks end where 32 tokens end, so
what is read are the whole sentences that touch them: those that match the
prompt best first, as many tokens as the base reads well, in the order of the
text. What the model itself said is no evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mcjax.answer import turns
from mcjax.answer.matching import Matcher, QueryWords
from mcjax.answer.sentences import (
  asks,
  sentence_ends,
  sentence_spans,
  word_start,
)
from mcjax.base.tokenizer import Tokenizer
from mcjax.tree.journal import overlaps
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING

LEAST = 0.6  # share of the best sentence's match that others must have
_REACH = 64  # tokens on each side in which a sentence's edges are looked for:
# of one whose edge is farther, each block is a part of its own


class Reader:
  """Chooses what is read of one history, its `tree`."""

  def __init__(self, tree: MegaContextTree, tokenizer: Tokenizer,
               matcher: Matcher):
    self.tree, self._tokenizer, self._matcher = tree, tokenizer, matcher
    self._kept: dict[int, list[tuple[int, int]]] = {}
    self._kept_for: tuple[int, int, int] | None = None

  def spans(self, evidence: Sequence[tuple[int, float]], query: QueryWords,
            most: int, stop: int, least: float = LEAST
            ) -> tuple[tuple[int, int], ...]:
    """Token spans (start, stop) to read, in order, none twice, by words alone.

    What is a question itself has the prompt's words and tells nothing: it is
    left out.

    Args:
      evidence: (L1 block, strength in [0, 1]), best first.
      query: the words of the prompt.
      most: tokens in all, except that the first sentence is read in any case.
      stop: token at which the prompt begins.
      least: share of the best sentence's match that another must have.
    """
    found = self.candidates(evidence, stop)
    return chosen({span: self.share(span, query) * strength
                   for span, strength in found.items()
                   if not asks(self._text(span))}, most, least)

  def _text(self, span: tuple[int, int]) -> str:
    return "".join(self._matcher.table.text(self.tree.tokens(*span)))

  def candidates(self, evidence: Sequence[tuple[int, float]], stop: int
                 ) -> dict[tuple[int, int], float]:
    """{token span: best strength} of the sentences that touch the evidence.

    None lies within another: of a long sentence a block may see all of it and
    the next one a part.

    The newest tokens before the prompt are no block yet, so no policy scores
    them: where anything is read, their sentences are weighed like the best.
    """
    found: dict[tuple[int, int], float] = {}
    evidence = list(evidence)
    if evidence and stop % BRANCHING:
      best = max(strength for _, strength in evidence)
      evidence.append((stop // BRANCHING, best))
    for block, strength in evidence:
      for span in self.sentences(block, stop):
        found[span] = max(found.get(span, strength), strength)
    kept: dict[tuple[int, int], float] = {}
    for a, b in sorted(found, key=lambda s: (s[0], -s[1])):
      last = next(reversed(kept), None)
      if last and b <= last[1]:
        kept[last] = max(kept[last], found[a, b])
      else:
        kept[a, b] = found[a, b]
    return kept

  def sentences(self, block: int, stop: int) -> list[tuple[int, int]]:
    """Token spans of the sentences that touch a block and may be evidence.

    Kept until another prompt asks or the tree is changed but for its end.
    """
    events = len(self.tree.journal.events)
    if self._kept_for != (stop, self.tree.revision, events):
      self._kept, self._kept_for = {}, (stop, self.tree.revision, events)
    if block not in self._kept:
      self._kept[block] = self._cut(block, stop)
    return self._kept[block]

  def _cut(self, block: int, stop: int) -> list[tuple[int, int]]:
    start = max(0, block * BRANCHING - _REACH)
    end = min(stop, (block + 1) * BRANCHING + _REACH)
    ids = self.tree.tokens(start, end)
    special = np.isin(ids, list(self._tokenizer.special_ids))
    pieces = self._matcher.table.text(ids)
    who = turns.speakers(self.tree, self._tokenizer, start, end)
    ends = sentence_ends(pieces, special)
    ends[:-1] |= who[1:] != who[:-1]
    journal, places = self.tree.journal, np.arange(start, end)
    ends[:-1] |= journal.edges(start + 1, end)  # of documents
    gone = overlaps(journal.forgotten, places, places + 1)
    first, last = block * BRANCHING - start, (block + 1) * BRANCHING - start
    out = []
    for a, b in sentence_spans(ends):
      if (a == 0 and start > 0) or (b == len(ids) and end < stop
                                    and not ends[-1]):
        a = max(a, word_start(pieces, first))
        b = min(b, word_start(pieces, last)) if last < len(ids) else b
      blank = special[a:b].all() or not "".join(pieces[a:b]).strip()
      if (a < last and b > first and not (blank or gone[a])
          and who[a] in (turns.TEXT, turns.USER)):
        out.append((start + a, start + b))
    return out

  def share(self, span: tuple[int, int], query: QueryWords) -> float:
    """Share of the query's weight that tokens of a span hold, in [0, 1].

    By words spelled or meant alike.
    """
    if not len(query.ids):
      return 1.0
    table, ids = self._matcher.table, self.tree.tokens(*span)
    words = np.unique(table.numbers(table.read(ids), ids))
    if not len(words):
      return 0.0
    like = np.maximum(table.spelling(words, query.ids),
                      table.meaning(words, query.ids)).max(axis=0)
    return float(like @ query.weights / (query.weights.sum() + 1e-6))


def chosen(scored: Mapping[tuple[int, int], float], most: int, least: float
           ) -> tuple[tuple[int, int], ...]:
  """The best of scored token spans, in order; see `Reader.spans`."""
  kept, room = [], most
  top = least * max(scored.values(), default=0.0)
  for (a, b), score in sorted(scored.items(), key=lambda s: (-s[1], s[0])):
    if kept and (b - a > room or score < top):
      continue
    kept.append((a, b))
    room -= b - a
  return joined(kept)


def joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
  """Spans in order, those that touch as one."""
  out: list[tuple[int, int]] = []
  for a, b in sorted(spans):
    if out and a <= out[-1][1]:
      out[-1] = (out[-1][0], max(b, out[-1][1]))
    else:
      out.append((a, b))
  return tuple(out)
