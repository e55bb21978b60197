"""What LensNet looks at: the blocks of the window, the query and the tail.

A row is an L1 block: raw in the window (32 L0 entries), there as its gist, or
found by the search below a coarse entry. An edit always concerns such a block,
so a row is what a score is about; scores of blocks become scores of entries
in `lensnet_policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mcjax.tree import lexical_rank
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.focus_view import FocusView
from mcjax.window.working_context import WorkingContext

RAW, GIST, BURIED = range(3)  # states of a row
MARGIN = 16  # neighbouring tokens shown on each side of a block
SPAN = BRANCHING + 2 * MARGIN
QUERY = 128  # query tokens, padded
TAIL_GISTS = 6
TAIL = TAIL_GISTS + 1 + BRANCHING  # gists, the newest block's, newest tokens


class Rows(NamedTuple):
  """Blocks on the host; R of them, in no particular order.

  Attributes:
    block: [R] int64 index of the L1 node.
    state: [R] int32, RAW, GIST or BURIED.
    entry: [R] int64 first entry of the block, or the coarse entry above it.
  """

  block: np.ndarray
  state: np.ndarray
  entry: np.ndarray

  def __len__(self) -> int:
    return len(self.block)


class LensInputs(NamedTuple):
  """LensNet's inputs, padded to fixed shapes.

  Attributes:
    ids: [R, SPAN] int32 tokens of a block and its neighbours; -1 for none.
    gists: [R, D] float32.
    state: [R] int32, see `Rows`.
    distance: [R] float32 tokens between a block and the cursor.
    mask: [R] bool, False for padding.
    query_ids: [QUERY] int32, -1 for none.
    query_weights: [QUERY] float32 by age.
    query_rarity: [QUERY] float32 inverse block frequency in nats.
    newest_ids: [32] int32 newest tokens, the newest last; -1 for none.
    newest_rarity: [32] float32.
    asked: [] float32, 1 if the query is a question.
    tail: [TAIL, D] float32 coarsest and newest gists, newest tokens.
    tail_mask: [TAIL] bool.
  """

  ids: np.ndarray
  gists: np.ndarray
  state: np.ndarray
  distance: np.ndarray
  mask: np.ndarray
  query_ids: np.ndarray
  query_weights: np.ndarray
  query_rarity: np.ndarray
  newest_ids: np.ndarray
  newest_rarity: np.ndarray
  asked: np.ndarray
  tail: np.ndarray
  tail_mask: np.ndarray


def window_rows(window: WorkingContext, found: Sequence[int]) -> Rows:
  """The window's blocks and those of `found` that lie below coarse entries."""
  e = window.entries
  raw = np.flatnonzero(window.sibling_groups() & (e.level == 0))
  gist = np.flatnonzero(e.level == 1)
  starts = e.start()
  buried, above = [], []
  for block in found:
    at = int(np.searchsorted(starts, block * BRANCHING, side="right")) - 1
    if e.level[at] > 1:
      buried.append(block)
      above.append(at)
  return Rows(
    np.concatenate([e.index[raw] // BRANCHING, e.index[gist],
                    np.array(buried, np.int64)]),
    np.repeat(np.array([RAW, GIST, BURIED], np.int32),
              [len(raw), len(gist), len(buried)]),
    np.concatenate([raw, gist, np.array(above, np.int64)]),
  )


def block_spans(tree: MegaContextTree, blocks: np.ndarray) -> np.ndarray:
  """Tokens [n, SPAN] int32 around blocks; -1 beyond the history's ends."""
  out = np.full((len(blocks), SPAN), -1, np.int32)
  for run in _runs(blocks):
    first, last = int(blocks[run[0]]), int(blocks[run[-1]])
    low = first * BRANCHING - MARGIN
    high = (last + 1) * BRANCHING + MARGIN
    flat = np.full(high - low, -1, np.int32)
    a, b = max(low, 0), min(high, tree.cursor)
    flat[a - low : b - low] = tree.tokens(a, b)
    out[run] = np.lib.stride_tricks.sliding_window_view(
      flat, SPAN)[::BRANCHING]
  return out


def block_gists(tree: MegaContextTree, blocks: np.ndarray) -> np.ndarray:
  """Gists [n, D] float32 of blocks."""
  out = np.zeros((len(blocks), tree.d_model), np.float32)
  for run in _runs(blocks):
    first = int(blocks[run[0]])
    out[run] = tree.gists(1, first, first + len(run))
  return out


def _runs(values: np.ndarray) -> list[np.ndarray]:
  """Positions of `values`, cut where they do not count up by one."""
  if not len(values):
    return []
  cuts = np.flatnonzero(np.diff(values) != 1) + 1
  return np.split(np.arange(len(values)), cuts)


def rarity(tree: MegaContextTree, ids: np.ndarray) -> np.ndarray:
  """Inverse block frequency [n] float32 in nats; 0 where no block has it."""
  ones = np.ones(len(ids), np.float32)
  weights = lexical_rank.query_weights(tree, np.asarray(ids), ones)
  return (weights ** np.float32(1 / lexical_rank.IDF_POWER)).astype(np.float32)


def gather(view: FocusView, rows: Rows, size: int, embed, encoder
           ) -> LensInputs:
  """Reads what LensNet needs, padded to `size` rows.

  Args:
    view: the policy's view.
    rows: blocks, at most `size`.
    size: rows of the result.
    embed: token ids [n] -> input embeddings [n, D] float32.
    encoder: the GistNet, for the newest tokens' provisional gist.
  """
  tree, count = view.tree, len(rows)
  ids = np.full((size, SPAN), -1, np.int32)
  gists = np.zeros((size, tree.d_model), np.float32)
  state = np.zeros(size, np.int32)
  distance = np.zeros(size, np.float32)
  ids[:count] = block_spans(tree, rows.block)
  gists[:count] = block_gists(tree, rows.block)
  state[:count] = rows.state
  distance[:count] = tree.cursor - (rows.block + 1) * BRANCHING
  query_ids = np.full(QUERY, -1, np.int32)
  weights, rare = np.zeros((2, QUERY), np.float32)
  asked = view.query_ids[-QUERY:]
  query_ids[: len(asked)] = asked
  weights[: len(asked)] = view.query_weights[-QUERY:]
  rare[: len(asked)] = rarity(tree, asked)
  newest = tree.tokens(max(0, tree.cursor - BRANCHING), tree.cursor)
  newest_ids = np.full(BRANCHING, -1, np.int32)
  newest_rarity = np.zeros(BRANCHING, np.float32)
  newest_ids[BRANCHING - len(newest) :] = newest
  newest_rarity[BRANCHING - len(newest) :] = rarity(tree, newest)
  tail, tail_mask = read_tail(tree, embed, encoder)
  return LensInputs(
    ids, gists, state, distance, np.arange(size) < count, query_ids, weights,
    rare, newest_ids, newest_rarity, np.asarray(view.asked, np.float32), tail,
    tail_mask,
  )


def read_tail(tree: MegaContextTree, embed, encoder):
  """Coarsest and newest gists, the provisional gist, the newest tokens.

  Returns:
    tail [TAIL, D] float32 and its mask [TAIL] bool; arguments as of `gather`.
  """
  newest = tree.tokens(max(0, tree.cursor - BRANCHING), tree.cursor)
  tail = np.zeros((TAIL, tree.d_model), np.float32)
  mask = np.zeros(TAIL, bool)
  gists = []
  if tree.top_level > 1:
    count = tree.num_nodes(tree.top_level)
    gists.append(tree.gists(tree.top_level, max(0, count - 2), count))
  count = tree.num_nodes(1)
  gists.append(tree.gists(1, max(0, count - 4), count))
  rows = np.concatenate(gists)[:TAIL_GISTS]
  tail[: len(rows)] = rows
  mask[: len(rows)] = True
  if len(newest) == BRANCHING:
    tail[TAIL_GISTS] = encoder.encode_tokens(newest[None])[0]
    mask[TAIL_GISTS] = True
  padded = np.zeros(BRANCHING, np.int32)
  padded[: len(newest)] = newest
  tail[TAIL_GISTS + 1 :] = embed(padded)
  mask[TAIL_GISTS + 1 : TAIL_GISTS + 1 + len(newest)] = True
  return tail, mask
