"""One checker of every invariant of window, cache and tree.

Used by the tests and by `Config(check_invariants=True)`.
"""

from __future__ import annotations

import numpy as np

from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, span_width
from mcjax.window.context_lm import ContextLM
from mcjax.window.working_context import WorkingContext


class InvariantError(AssertionError):
  """An invariant does not hold; the message names it."""


def _require(ok: bool, name: str, detail: str = "") -> None:
  if not ok:
    raise InvariantError(f"{name}: {detail}" if detail else name)


def check_window(
  context: WorkingContext, cursor: int, *, max_level: int, sink: int = 0
) -> None:
  """Budget, contiguity, alignment, levels, slots and the pinned sink.

  Args:
    context: the window.
    cursor: tokens in the history.
    max_level: highest level the tree holds.
    sink: tokens from the start that must be at L0.

  Raises:
    InvariantError: names the invariant and the first offender.
  """
  e = context.entries
  _require(len(e) <= context.window, "budget",
           f"{len(e)} entries in {context.window} slots")
  starts, widths = e.start(), e.width()
  edges = np.concatenate([[0], starts + widths])
  gaps = np.flatnonzero(edges[:-1] != starts)
  _require(not len(gaps), "contiguity",
           f"entry {gaps[:1]} does not start where the last one ends")
  _require(int(edges[-1]) == cursor, "contiguity",
           f"entries end at {edges[-1]}, the history at {cursor}")
  _require(bool(np.all(starts % widths == 0)), "alignment")
  _require(bool(np.all((e.level >= 0) & (e.level <= max_level))),
           "level consistency")
  _require(len(np.unique(e.slot)) == len(e), "slots are shared")
  used = set(e.slot.tolist())
  _require(used.isdisjoint(context._free), "a used slot is on the free list")
  _require(len(used) + context.free == context.window, "slots leak")
  pinned = starts < min(sink, cursor)
  _require(bool(np.all(e.level[pinned] == 0)), "sink is not at L0")


def check_positions(
  context: WorkingContext, gist_stride: int, max_positions: int
) -> None:
  """Positions rise strictly and leave room for the next block.

  In the order in which the LM reads: a prompt's head may come first. With a
  stride of 0 gists take none, as hidden tokens do; those of the rest
  rise.
  """
  positions = context.positions(gist_stride, max_positions)
  taken = ~context.hidden()
  if not gist_stride:
    taken &= context.entries.level == 0
  order = np.arange(len(positions))
  if context.attention is not None:
    order = context.attention.order(context.entries)
  positions = positions[order][taken[order]]
  _require(bool(np.all(np.diff(positions) > 0)), "monotone positions")
  last = context.next_position(gist_stride, max_positions)
  _require(last + min(BRANCHING, context.free) <= max_positions,
           "positions exceed the base")
  if len(positions):
    _require(int(positions[-1]) < last, "monotone positions", "next token")


def check_tree(tree: MegaContextTree, encode=None) -> None:
  """Every level holds exactly the complete nodes, and no zero vector.

  Args:
    tree: the history; O(history), for tests.
    encode: the tree's Encoder; given, the content of every gist is compared.
  """
  for level in range(1, tree.top_level + 1):
    count = tree.cursor // span_width(level)
    _require(tree.num_nodes(level) == count, "complete nodes",
             f"level {level} holds {tree.num_nodes(level)} of {count}")
    gists = tree.gists(level, 0, count)
    _require(bool(np.all(np.any(gists != 0, axis=-1))), "zero gist")
    if encode is not None:
      if level == 1:
        blocks = tree.tokens(0, count * BRANCHING).reshape(count, BRANCHING)
        expected = encode.encode_tokens(blocks)
      else:
        below = tree.gists(level - 1, 0, count * BRANCHING)
        expected = encode.encode_gists(
          below.reshape(count, BRANCHING, -1), level
        )
      scale = np.max(np.abs(expected), axis=-1, keepdims=True)
      _require(bool(np.all(np.abs(gists - expected) <= 0.01 * scale)),
               "gist content", f"level {level}")


def check_contents(context_lm: ContextLM, tree: MegaContextTree) -> None:
  """Every slot holds the token or the gist of its entry's node in the tree."""
  e = context_lm.window.entries
  for level, index, slot in zip(e.level, e.index, e.slot):
    index = int(index)
    if level == 0:
      close = context_lm.ids[slot] == tree.tokens(index, index + 1)[0]
    else:
      close = np.allclose(
        context_lm.gists[slot], tree.gists(int(level), index, index + 1)[0],
        rtol=1e-2, atol=1e-4)
    _require(bool(close) and context_lm.is_gist[slot] == (level > 0),
             "tree-window consistency",
             f"slot {slot} does not hold L{level} node {index}")
