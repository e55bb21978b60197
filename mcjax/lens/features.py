"""What LensNet looks at: blocks, the query, how they match, and the tail.

A row is an L1 block: raw in the window (32 L0 entries), there as its gist, or
found by the search below a coarse entry. An edit always concerns such a block,
so a row is what a score is about; scores of blocks become scores of entries
in `lens.policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mcjax.answer.matching import (
  MARKS,
  REACH,
  Matcher,
  Matches,
  QueryWords,
  runs_of,
)
from mcjax.base.tokenizer import Tokenizer
from mcjax.gist.encoder import GistEncoder
from mcjax.lens import alignment
from mcjax.tree import lexical_keys, lexical_rank
from mcjax.tree.journal import touched
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, Array
from mcjax.window.working_context import WorkingContext

RAW, GIST, BURIED = range(3)  # states of a row
TAIL_GISTS = 6
TAIL = TAIL_GISTS + 1 + BRANCHING  # gists, the newest block's, newest tokens
_RARE = 10.0  # nats of rarity that count as 1
_SPANS = ("own", "near", "wide")  # a block, with 1 and with 2 on each side
_SHARES = ("exact", "spelling", "meaning", "pairs")
_RANKED = ("exact_near", "exact_wide", "meaning_near", "spelling_near",
           "times_near", "times_wide", "key_own", "key_near", "pairs_near")
# Of the prompt's words and those of the user's turn before it, together.
_JOINED = ("exact_own", "exact_near", "exact_wide", "meaning_near",
           "times_near", "key_near")
_RANKED_JOINED = ("joined_exact_near", "joined_meaning_near")

NAMES = (
  *(f"{share}_{span}" for share in _SHARES for span in _SPANS),
  *(f"key_{span}" for span in _SPANS),
  "times_near", "times_wide", "rarest_own", "rarest_near", "words_near",
  "first", "second", "third", "parent", "new_own", "new_near", "repeats",
  *(f"best_{name}" for name in _RANKED), *(f"rank_{name}" for name in _RANKED),
  "top_exact", "top_meaning", "top_times", "top_key", "top_pairs",
  "known", "length", "new_share", "asked",
  "raw", "gist", "buried", "distance", "within_2048", "within_256",
  *MARKS,
  *(f"joined_{name}" for name in _JOINED),
  *(f"best_{name}" for name in _RANKED_JOINED),
  *(f"rank_{name}" for name in _RANKED_JOINED), "top_joined", "before",
)
FEATURES = len(NAMES)
CONSTANT = tuple(  # the same for every row of a window
  i for i, name in enumerate(NAMES)
  if name.startswith("top_") or name in ("known", "length", "new_share",
                                         "asked", "before"))


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


class Asking(Protocol):
  """The part of a `FocusView` that a query is read from."""

  @property
  def tree(self) -> MegaContextTree: ...

  @property
  def query_ids(self) -> np.ndarray: ...

  @property
  def query_weights(self) -> np.ndarray: ...

  @property
  def query_start(self) -> int: ...

  @property
  def asked(self) -> bool: ...

  @property
  def query_before(self) -> np.ndarray | None: ...


class LensQuery(NamedTuple):
  """What is asked for, as LensNet reads it.

  Attributes:
    words: the query's words.
    key: [K] int32 learned key.
    gist: [D] float32 of its newest 32 tokens.
    asked: it is a prompt, not just the newest text.
    end: tokens of the history that it is compared with: those before a prompt;
      all where the newest text is the query.
    joined: the words of a prompt and of the user's turn before it, which a
      prompt such as "And who leads it?" leans on; `words` where there is none.
    joined_key: [K] int32 learned key of both.
  """

  words: QueryWords
  key: np.ndarray
  gist: np.ndarray
  asked: bool
  end: int
  joined: QueryWords
  joined_key: np.ndarray

  @property
  def blocks(self) -> int:
    """Complete blocks of the history that it is compared with."""
    return self.end // BRANCHING


class LensInputs(NamedTuple):
  """LensNet's inputs, padded to fixed shapes.

  Attributes:
    features: [R, FEATURES] float32, see `NAMES`.
    gists: [R, D] float32.
    block: [R] int32 index of the block.
    mask: [R] bool, False for padding.
    query: [D] float32 the query's gist.
    tail: [TAIL, D] float32 coarsest and newest gists, newest tokens.
    tail_mask: [TAIL] bool.
  """

  features: Array
  gists: Array
  block: Array
  mask: Array
  query: Array
  tail: Array
  tail_mask: Array


def empty_inputs(size: int, d_model: int) -> LensInputs:
  """Inputs of `size` rows that hold nothing."""
  return LensInputs(
    np.zeros((size, FEATURES), np.float32),
    np.zeros((size, d_model), np.float32), np.zeros(size, np.int32),
    np.zeros(size, bool), np.zeros(d_model, np.float32),
    np.zeros((TAIL, d_model), np.float32), np.zeros(TAIL, bool))


def window_rows(window: WorkingContext, found: Sequence[int], stop: int
                ) -> Rows:
  """The window's blocks and those of `found` that lie below coarse entries.

  Blocks that hold anything forgotten, or a token from `stop` on, are left out.
  """
  e = window.entries
  raw = np.flatnonzero(window.sibling_groups() & (e.level == 0))
  gist = np.flatnonzero(e.level == 1)
  starts = e.start()
  buried, above = [], []
  for block in dict.fromkeys(found):
    at = int(np.searchsorted(starts, block * BRANCHING, side="right")) - 1
    if e.level[at] > 1:
      buried.append(block)
      above.append(at)
  rows = Rows(
    np.concatenate([e.index[raw] // BRANCHING, e.index[gist],
                    np.array(buried, np.int64)]),
    np.repeat(np.array([RAW, GIST, BURIED], np.int32),
              [len(raw), len(gist), len(buried)]),
    np.concatenate([raw, gist, np.array(above, np.int64)]),
  )
  kept = ~touched(window.forgotten, rows.block)
  kept &= (rows.block + 1) * BRANCHING <= stop
  return Rows(*(part[kept] for part in rows))


def read_query(matcher: Matcher, keyer, encoder: GistEncoder,
               tokenizer: Tokenizer, view: Asking) -> LensQuery:
  """The query of a view, for `gather`."""
  ids = np.asarray(view.query_ids, np.int32)
  newest = np.full(BRANCHING, int(tokenizer.encode("\n")[0]), np.int32)
  part = ids[-BRANCHING:]
  newest[BRANCHING - len(part) :] = part
  end = view.query_start if view.asked else view.tree.cursor
  words = joined = matcher.query(ids, view.query_weights, end // BRANCHING)
  key = joined_key = keyer.query(ids, view.query_weights)
  before = view.query_before
  if view.asked and before is not None and len(before):
    both = np.concatenate([ids, before]).astype(np.int32)
    weights = np.ones(len(both), np.float32)
    joined = matcher.query(both, weights, end // BRANCHING)
    joined_key = keyer.query(both, weights)
  return LensQuery(
    words, key, encoder.encode_tokens(newest[None])[0], view.asked, end,
    joined, joined_key)


def gather(
  tree: MegaContextTree, rows: Rows, size: int, query: LensQuery,
  matcher: Matcher,
  tail: tuple[np.ndarray, np.ndarray],
) -> LensInputs:
  """Reads what LensNet needs, padded to `size` rows.

  Args:
    tree: the history.
    rows: blocks, at most `size`.
    size: rows of the result.
    query: see `read_query`.
    matcher: of the tree.
    tail: see `read_tail`.
  """
  features = np.zeros((size, FEATURES), np.float32)
  gists = np.zeros((size, tree.d_model), np.float32)
  block, count = np.zeros(size, np.int32), len(rows)
  if count:
    features[:count] = row_features(tree, rows, query, matcher)
    gists[:count] = matcher.gists(rows.block)
  block[:count] = rows.block
  return LensInputs(
    features, gists, block, np.arange(size) < count,
    np.asarray(query.gist, np.float32), *tail)


def row_features(
  tree: MegaContextTree, rows: Rows, query: LensQuery, matcher: Matcher
) -> np.ndarray:
  """Features [R, FEATURES] float32 of rows; see `NAMES`."""
  around = matcher.blocks_around(rows.block, query.blocks)
  place = {block: i for i, block in enumerate(around.tolist())}
  at = np.array([  # the last row of padded arrays is a block that is not there
    [place.get(block + d, len(around)) for d in range(-REACH, REACH + 1)]
    for block in rows.block.tolist()])
  matches, keys = matcher.match(around, query.words), matcher.keys(around)
  out = joined = _match_features(matches, query.words, at) | _key_features(
    keys, query.key, at)
  if query.joined is not query.words:
    joined = _match_features(
      matcher.match(around, query.joined), query.joined, at
    ) | _key_features(keys, query.joined_key, at)
  out = out | {f"joined_{name}": joined[name] for name in _JOINED}
  out["parent"] = _parent_share(tree, rows.block, query.words)
  out |= _novelty(matches, query.words, at, rows.state)
  out["repeats"] = np.zeros(len(rows), np.float32)
  if not query.asked:
    out["repeats"] = _repeats(tree, rows)
  for name in (*_RANKED, *_RANKED_JOINED):
    value = out[name]
    out[f"best_{name}"] = value / (value.max(initial=0.0) + 1e-3)
    rank = np.empty(len(value))
    rank[np.argsort(-value, kind="stable")] = np.arange(len(value))
    out[f"rank_{name}"] = 1.0 / (1.0 + rank / 4.0)
  for name, source in (("exact", "exact_near"), ("meaning", "meaning_near"),
                       ("times", "times_near"), ("key", "key_near"),
                       ("pairs", "pairs_near"),
                       ("joined", "joined_exact_near")):
    out[f"top_{name}"] = np.full(len(rows), out[source].max(initial=0.0))
  more = query.joined.weights.sum() - query.words.weights.sum()
  out["before"] = np.full(
    len(rows), max(0.0, more) / (query.joined.weights.sum() + 1e-6))
  out["known"] = np.full(len(rows), query.words.known)
  out["length"] = np.full(len(rows), np.log2(1 + len(query.words.ids)) / 8)
  out["asked"] = np.full(len(rows), float(query.asked))
  distance = query.end - (rows.block + 1) * BRANCHING
  out["distance"] = np.log2(1 + np.maximum(distance, 0) / BRANCHING) / 16
  out["within_2048"] = np.minimum(distance, 2048) / 2048
  out["within_256"] = np.where(distance < 256, 1 - distance / 256, 0.0)
  for name, state in (("raw", RAW), ("gist", GIST), ("buried", BURIED)):
    out[name] = rows.state == state
  marks = matcher.marks(rows.block)
  out |= {name: marks[:, i] for i, name in enumerate(MARKS)}
  return np.stack([np.asarray(out[name], np.float32) for name in NAMES], 1)


def _spread(values: np.ndarray, at: np.ndarray, reduce=np.maximum):
  """Values [U, …] of blocks, by themselves, with 1 and with 2 on each side."""
  padded = np.concatenate([values, np.zeros_like(values[:1])])
  own = padded[at[:, 2]]
  near = reduce(reduce(padded[at[:, 1]], padded[at[:, 3]]), own)
  return own, near, reduce(reduce(padded[at[:, 0]], padded[at[:, 4]]), near)


def _match_features(m: Matches, words: QueryWords, at: np.ndarray) -> dict:
  """How much of the query's weight blocks hold, in its several senses."""
  w = words.weights
  total = w.sum() + 1e-6
  spelling = np.where(m.spelling > 0.4, m.spelling, 0.0)
  out = {}
  for name, values in (("exact", m.exact), ("spelling", spelling),
                       ("meaning", np.maximum(m.exact, m.meaning))):
    for span, held in zip(_SPANS, _spread(values, at)):
      out[f"{name}_{span}"] = held @ w / total
  pair = np.minimum(w[:-1], w[1:])
  for span, held in zip(_SPANS, _spread(m.pairs, at)):
    out[f"pairs_{span}"] = held @ pair / (pair.sum() + 1e-6)
  own, near, _ = _spread(m.exact, at)
  _, times, wider = _spread(m.times, at, np.add)
  # The saturation of BM25 (Robertson and Zaragoza 2009), k1 = 1.5 and more.
  out["times_near"] = times / (times + 1.5) @ w / total
  out["times_wide"] = wider / (wider + 2.5) @ w / total
  out["rarest_own"] = (own * w).max(axis=1, initial=0.0) / _RARE
  out["rarest_near"] = (near * w).max(axis=1, initial=0.0) / _RARE
  out["words_near"] = near.sum(axis=1) / max(1, near.shape[1])
  order = np.argsort(-w, kind="stable")
  for i, name in enumerate(("first", "second", "third")):
    out[name] = (near[:, order[i]] if i < len(order)
                 else np.zeros(len(at), np.float32))
  return out


def _key_features(keys: np.ndarray, key: np.ndarray, at: np.ndarray) -> dict:
  """Cosines of the query's learned key and those of spans of blocks."""
  keys, q = keys.astype(np.float32), key.astype(np.float32)
  out = {}
  for span, total in zip(_SPANS, _spread(keys, at, np.add)):
    length = np.linalg.norm(total, axis=1) * np.linalg.norm(q) + 1e-6
    out[f"key_{span}"] = total @ q / length
  return out


def _parent_share(tree: MegaContextTree, blocks: np.ndarray,
                  words: QueryWords) -> np.ndarray:
  """Share of the query's tokens that the 1,024 around a block may hold."""
  out = np.zeros(len(blocks), np.float32)
  parents = blocks // BRANCHING
  known = np.unique(parents[parents < tree.num_nodes(2)])
  if not len(known) or not len(words.token_ids):
    return out
  keys = np.concatenate([
    tree.keys(2, int(known[run[0]]), int(known[run[-1]]) + 1)
    for run in runs_of(known)])
  score = lexical_keys.scorer(words.token_ids, words.token_weights)(keys)
  share = score / (words.token_weights.sum() + 1e-6)
  place = np.searchsorted(known, parents)
  inside = (place < len(known)) & (
    known[np.minimum(place, len(known) - 1)] == parents)
  out[inside] = share[place[inside]]
  return out


def _novelty(m: Matches, words: QueryWords, at: np.ndarray,
             state: np.ndarray) -> dict:
  """What blocks hold of the query that the raw text does not show."""
  own, near, _ = _spread(m.exact, at)
  shown = own[state == RAW].max(axis=0, initial=0.0)
  new = words.weights * (1 - shown)
  total = words.weights.sum() + 1e-6
  return {"new_own": own @ new / total, "new_near": near @ new / total,
          "new_share": np.full(len(at), new.sum() / total)}


def _repeats(tree: MegaContextTree, rows: Rows) -> np.ndarray:
  """How well the newest tokens repeat what stands before a block, [R].

  Of far blocks only beyond what the newest run of raw text repeats itself.
  """
  newest = tree.tokens(max(0, tree.cursor - alignment.SPAN), tree.cursor)
  weights = alignment.span_weights(rarity(tree, newest))
  raw = np.sort(rows.block[rows.state == RAW])
  gaps = np.flatnonzero(np.diff(raw) != 1)
  first = int(raw[gaps[-1] + 1 if len(gaps) else 0]) if len(raw) else 0
  first = first if len(raw) else tree.cursor // BRANCHING
  stop = first * BRANCHING
  blocks = np.unique(np.concatenate([rows.block, rows.block - 1]))
  far = alignment.continuations(
    tree, blocks[(blocks >= 0) & (blocks < first)].tolist(), newest, weights,
    stop)
  near = alignment.continuations(
    tree, blocks[blocks >= first].tolist(), newest, weights, tree.cursor - 1)
  shown = alignment.agreements(
    tree.tokens(stop, max(stop, tree.cursor - 1)), newest, weights
  ).max(initial=0.0)
  far = {block: share for block, share in far.items() if share > shown}
  return np.array([
    (far if b < first else near).get(b, 0.0) for b in rows.block.tolist()
  ], np.float32)


def rarity(tree: MegaContextTree, ids: np.ndarray) -> np.ndarray:
  """Inverse block frequency [n] float32 in nats; 0 where no block has it."""
  ones = np.ones(len(ids), np.float32)
  weights = lexical_rank.query_weights(tree, np.asarray(ids), ones)
  return (weights ** np.float32(1 / lexical_rank.IDF_POWER)).astype(np.float32)


def read_tail(tree: MegaContextTree,
              embed: Callable[[np.ndarray], np.ndarray],
              query: LensQuery) -> tuple[np.ndarray, np.ndarray]:
  """Coarsest and newest gists, the query's gist, the newest tokens.

  Args:
    tree: the history.
    embed: token ids [n] -> input embeddings [n, D] float32.
    query: what is asked, whose own blocks are none of the newest.

  Returns:
    tail [TAIL, D] float32 and its mask [TAIL] bool.
  """
  newest = tree.tokens(max(0, tree.cursor - BRANCHING), tree.cursor)
  tail = np.zeros((TAIL, tree.d_model), np.float32)
  mask = np.zeros(TAIL, bool)
  gists = []
  if tree.top_level > 1:
    count = tree.num_nodes(tree.top_level)
    gists.append(tree.gists(tree.top_level, max(0, count - 2), count))
  gists.append(tree.gists(1, max(0, query.blocks - 4), query.blocks))
  rows = np.concatenate(gists)[:TAIL_GISTS]
  tail[: len(rows)] = rows
  mask[: len(rows)] = True
  tail[TAIL_GISTS] = query.gist
  mask[TAIL_GISTS] = True
  padded = np.zeros(BRANCHING, np.int32)
  padded[: len(newest)] = newest
  tail[TAIL_GISTS + 1 :] = embed(padded)
  mask[TAIL_GISTS + 1 : TAIL_GISTS + 1 + len(newest)] = True
  return tail, mask
