"""Which blocks from far back text that is read on wishes to see raw.

What a block of plain text is worth for the next tokens can hardly be foreseen,
with two exceptions. Where the newest tokens repeat an earlier passage, token
against token, the LM copies what came next there (`alignment.py`). And where
most of the newest words are new to the window, a topic has come up that may
have been dealt with before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcjax.lens import alignment
from mcjax.lens import features as lens_rows
from mcjax.tree import lexical_rank
from mcjax.types import BRANCHING
from mcjax.window.focus_view import FocusView
from mcjax.window.working_context import Entries

WISHES = 4  # blocks wished for at one time
_REPEATED = 0.3  # share of the newest tokens' weight that must agree in place
_SHIFTED = 0.8  # share of the newest text that is new where a topic has changed
_NOVEL = 0.05  # share of it from which a far block is wished for
_LEAST = 0.2  # the allocator's threshold, from which a score is a wish


def newest_raw(entries: Entries) -> int:
  """The first entry of the raw text that reaches up to the cursor."""
  coarse = np.flatnonzero(entries.level > 0)
  return int(coarse[-1]) + 1 if len(coarse) else 0


def wishes(view: FocusView, found: Sequence[int], candidates: Sequence[int]
           ) -> dict[int, float]:
  """{block: score in (0.2, 1]} of at most `WISHES` blocks wished for.

  Args:
    view: the policy's view; its query is the newest text.
    found: blocks that may hold words of a topic that has come up again.
    candidates: blocks that may hold a passage that is repeated.
  """
  out = {b: min(0.5, _LEAST + share)
         for b, share in novelty(view, found).items() if share >= _NOVEL}
  out |= {b: 0.5 + share / 2
          for b, share in continuations(view, candidates).items()}
  best = sorted(out.items(), key=lambda item: -item[1])
  return dict(best[:WISHES])


def continuations(view: FocusView, candidates: Sequence[int]
                  ) -> dict[int, float]:
  """Far blocks that go on where the newest tokens repeat something.

  Only where the passage agrees better than any in the newest raw text, which
  the LM sees anyway.

  Args:
    view: the policy's view.
    candidates: blocks looked at, beside the ones that follow them and those
      that are raw already.

  Returns:
    {block: share of the newest tokens, by rarity and age, that agree}.
  """
  first, tree = newest_raw(view.entries), view.tree
  if first == len(view.entries):
    return {}
  start = int(view.entries.start()[first])
  newest = tree.tokens(max(0, tree.cursor - alignment.SPAN), tree.cursor)
  weights = alignment.span_weights(lens_rows.rarity(tree, newest))
  last = start // BRANCHING
  near = [*candidates, *_far_raw(view.entries, first)]
  blocks = sorted({b + d for b in near for d in (0, 1) if b + d < last})
  found = alignment.continuations(
    tree, blocks, newest, weights, last * BRANCHING)
  shown = alignment.agreements(
    tree.tokens(start, tree.cursor - 1), newest, weights).max(initial=0.0)
  return {b: share for b, share in found.items()
          if share >= _REPEATED and share > shown}


def novelty(view: FocusView, found: Sequence[int]) -> dict[int, float]:
  """What far blocks hold of a topic that the newest raw text does not show.

  Args:
    view: the policy's view.
    found: blocks that the searches propose; raw ones from farther back are
      asked too, so that they stay while they are needed.

  Returns:
    {block: its share, in [0, 1], of the query's weight by rarity and age};
    empty unless most of that weight is new to the newest raw text.
  """
  first = newest_raw(view.entries)
  if first == len(view.entries) or not len(view.query_ids):
    return {}
  start = int(view.entries.start()[first])
  near = view.tree.tokens(start, max(start, view.query_start))
  weights = lexical_rank.query_weights(
    view.tree, view.query_ids, view.query_weights)
  total = float(weights.sum())
  weights[np.isin(view.query_ids, near)] = 0.0
  new = float(weights.sum())
  if not new or new < _SHIFTED * total:
    return {}
  blocks = list(dict.fromkeys([*found, *_far_raw(view.entries, first)]))
  ranked = lexical_rank.rank_blocks(view.tree, blocks, view.query_ids, weights)
  return {b: share * new / total for b, share in ranked[:WISHES]}


def _far_raw(entries: Entries, first: int) -> list[int]:
  """Blocks of raw entries before entry `first`."""
  raw = entries.index[:first][entries.level[:first] == 0]
  return np.unique(raw // BRANCHING).tolist()
