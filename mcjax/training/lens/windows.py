"""Windows that LensNet learns from: what it reads, what each block is worth.

A prompt's window is made from a stored tree alone, without running the base:
blocks that the searches find and some raw ones, their features, and labels by
construction (`histories.py`). Where text is read on, the base measures what
blocks are worth (`effects.py`). One file a history; files that are there are
not made again, so an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
from typing import Any
import uuid

from etils import epath
import numpy as np

from mcjax.answer.matching import Matcher
from mcjax.answer.words import WordTable
from mcjax.base.load import BaseLM
from mcjax.gist.encoder import GistEncoder
from mcjax.lens import features as lens_features
from mcjax.lens.features import (
  BURIED,
  FEATURES,
  GIST,
  RAW,
  LensInputs,
  LensQuery,
  Rows,
)
from mcjax.lens.keyer import LensKeyer
from mcjax.lens.policy import Finder
from mcjax.parallel import places
from mcjax.training.lens.effects import Effects
from mcjax.training.lens.losses import Targets
from mcjax.training.lens.prompts import Example, History
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.focus_view import fading_weights
from mcjax.window.working_context import WorkingContext

ROWS = 160  # of a window at most
NODES = 256  # of a search
_AROUND = 0.3  # of evidence around the sentence that answers


@dataclasses.dataclass
class WindowSet:
  """N windows on several histories.

  Attributes:
    features: [N, ROWS, FEATURES] float16.
    block: [N, ROWS] int32; -1 for padding.
    gold: [N, ROWS] float16 how much of what answers the prompt a block holds.
    worth: [N, ROWS] float16 in [-1, 1], what a block is worth while text is
      read on; NaN where that was not measured.
    asked, answerable: [N] bool.
    newest: [N, 32] int32 newest tokens; -1 for none.
    query: [N, D] float16 gist of the query.
    history: [N] int32 row of `gists` and `coarse`.
    gists: per history [B, D] float16 of its blocks.
    coarse: per history [2, D] float16 newest nodes of its top level.
    cursor: [N] int32 tokens of the history that are there.
  """

  features: np.ndarray
  block: np.ndarray
  gold: np.ndarray
  worth: np.ndarray
  asked: np.ndarray
  answerable: np.ndarray
  newest: np.ndarray
  query: np.ndarray
  cursor: np.ndarray
  history: np.ndarray
  gists: list[np.ndarray]
  coarse: list[np.ndarray]

  def __len__(self) -> int:
    return len(self.block)

  @classmethod
  def load(cls, files: Sequence[epath.Path]) -> WindowSet:
    """Windows of all files, in order."""
    parts = [places.load_arrays(path) for path in files]
    names = [f.name for f in dataclasses.fields(cls)
             if f.name not in ("history", "gists", "coarse")]
    joined = {n: np.concatenate([p[n] for p in parts]) for n in names}
    history = np.concatenate([
      np.full(len(p["block"]), i, np.int32) for i, p in enumerate(parts)])
    return cls(**joined, history=history, gists=[p["gists"] for p in parts],
               coarse=[p["coarse"] for p in parts])

  def digest(self) -> str:
    """Names these windows, for a checkpoint."""
    digest = hashlib.blake2b(digest_size=8)
    for values in (self.features, self.block, self.gold, self.worth):
      digest.update(np.ascontiguousarray(values).tobytes())
    return f"{len(self)} windows, {digest.hexdigest()}"

  def inputs(self, rows: np.ndarray, embeddings: np.ndarray) -> LensInputs:
    """`LensInputs` of windows `rows` [B], with a leading axis.

    Args:
      rows: which windows.
      embeddings: [V, D] input embeddings of the base.
    """
    d = self.query.shape[1]
    mask = self.block[rows] >= 0
    gists = np.zeros((len(rows), ROWS, d), np.float32)
    tail = np.zeros((len(rows), lens_features.TAIL, d), np.float32)
    tail_mask = np.zeros((len(rows), lens_features.TAIL), bool)
    for i, row in enumerate(rows.tolist()):
      own = self.gists[self.history[row]]
      gists[i, mask[i]] = own[self.block[row][mask[i]]]
      last = int(self.cursor[row]) // BRANCHING
      newest = np.concatenate([
        self.coarse[self.history[row]], own[max(0, last - 4) : last]])
      newest = newest[: lens_features.TAIL_GISTS]
      tail[i, : len(newest)] = newest
      tail_mask[i, : len(newest)] = True
      tail[i, lens_features.TAIL_GISTS] = self.query[row]
      tail_mask[i, lens_features.TAIL_GISTS] = True
    first = lens_features.TAIL_GISTS + 1
    tail[:, first:] = embeddings[np.maximum(self.newest[rows], 0)]
    tail_mask[:, first:] = self.newest[rows] >= 0
    return LensInputs(
      self.features[rows].astype(np.float32), gists,
      np.maximum(self.block[rows], 0), mask,
      self.query[rows].astype(np.float32), tail, tail_mask)


  def targets(self, rows: np.ndarray) -> Targets:
    """Labels of windows `rows` [B]."""
    return Targets(
      self.gold[rows].astype(np.float32), self.worth[rows].astype(np.float32),
      self.asked[rows], self.answerable[rows])


class WindowMaker:
  """Turns histories into files of windows.

  Attributes:
    encoder: the base's GistNet.
    effects: measures blocks where text is read on; None if none is.
    table: of the words met so far.
  """

  def __init__(self, lm: BaseLM, encoder: GistEncoder, keyer: LensKeyer,
               seed: int = 0, effects: Effects | None = None):
    self._lm, self.encoder, self._keyer = lm, encoder, keyer
    self._seed, self.effects = seed, effects
    self.table = WordTable(lm.tokenizer, keyer.vectors, keyer.salience)

  def write(self, path: epath.Path, history: History, number: int) -> None:
    """Writes the windows of a history, in one atomic step."""
    rng = np.random.default_rng([self._seed, 9, number])
    examples = sorted(history.examples, key=lambda e: e.cursor)
    if not examples:
      return
    self.table.clear()  # a word's vector is that of where it stood first
    tree = self.tree(np.zeros(0, np.int32))
    of = self._asked if examples[0].asked else self._read_on
    found = list(of(tree, History(history.ids, tuple(examples)), rng))
    if not found:
      return
    arrays: dict[str, Any] = {
      name: np.stack([w[name] for w in found]) for name in found[0]}
    top, blocks = tree.top_level, tree.num_nodes(1)
    nodes = tree.num_nodes(top)
    coarse = tree.gists(top, max(0, nodes - 2), nodes) if top > 1 else (
      np.zeros((0, tree.d_model)))
    places.save_arrays(
      path, gists=tree.gists(1, 0, blocks).astype(np.float16),
      coarse=coarse.astype(np.float16), **arrays)
    tree.close()

  def tree(self, ids: np.ndarray) -> MegaContextTree:
    """A tree in memory of token ids [N]."""
    tree = MegaContextTree.create(
      f"memory://{uuid.uuid4()}/windows", base_fingerprint=self._lm.fingerprint,
      base_name=self._lm.name, encoder=self.encoder,
      vocab_size=self._lm.config.vocab_size, keyer=self._keyer)
    if len(ids):
      tree.append(ids)
    return tree

  def _asked(self, tree: MegaContextTree, history: History, rng
             ) -> Iterator[dict]:
    """Windows of prompts."""
    matcher = Matcher(tree, self.table)
    for example in history.examples:
      tree.append(history.ids[tree.cursor : example.cursor])
      if tree.num_nodes(1) >= BRANCHING and len(example.query):
        query, rows = self.look(tree, matcher, example, rng)
        gold = _gold(rows.block, example.gold, example.best)
        features = lens_features.row_features(tree, rows, query, matcher)
        yield self._arrays(tree, example, query, rows, features, gold=gold)

  def _read_on(self, tree: MegaContextTree, history: History, rng
               ) -> Iterator[dict]:
    """Windows of text that the base reads on."""
    if self.effects is None:
      raise ValueError("text is read on, and nothing measures what it is worth")
    matcher = Matcher(tree, self.table)
    for example, window in self.effects.follow(tree, history):
      query, rows = self.look(tree, matcher, example, rng, window)
      tail = lens_features.read_tail(tree, self._embeddings, query)
      inputs = lens_features.gather(tree, rows, ROWS, query, matcher, tail)
      features = np.asarray(inputs.features[: len(rows)])
      worth = self.effects.label(
        rows, features, self.effects.scores(inputs)[: len(rows)],
        example.future, rng)
      yield self._arrays(tree, example, query, rows, features, worth=worth)

  def _embeddings(self, ids: np.ndarray) -> np.ndarray:
    return np.asarray(self._lm.params["embed"][ids], np.float32)

  def look(self, tree: MegaContextTree, matcher: Matcher, example: Example,
           rng, window: WorkingContext | None = None
           ) -> tuple[LensQuery, Rows]:
    """The query of an example, and the rows of a window, or of one made up."""
    ids = example.query[-4 * BRANCHING :]
    weights = np.ones(len(ids), np.float32)
    if not example.asked:
      weights = fading_weights(len(ids))
    view = _Query(tree, ids, weights, tree.cursor, example.asked,
                  example.before)
    query = lens_features.read_query(
      matcher, self._keyer, self.encoder, self._lm.tokenizer, view)
    last = tree.num_nodes(1)
    if not example.asked:
      last -= -(-len(ids) // BRANCHING)
    finder = Finder(tree, query, last)
    finder.run(NODES)
    if window is None:
      return query, _rows(finder.blocks(), last, rng)
    rows = lens_features.window_rows(window, finder.blocks(), tree.cursor)
    return query, Rows(*(part[:ROWS] for part in rows))

  def _arrays(self, tree: MegaContextTree, example: Example, query: LensQuery,
              rows: Rows, values: np.ndarray, gold=0.0, worth=np.nan) -> dict:
    """One window, padded; `values` [R, FEATURES], labels [R] of the rows."""
    count = len(rows)
    features = np.zeros((ROWS, FEATURES), np.float16)
    features[:count] = values
    block = np.full(ROWS, -1, np.int32)
    block[:count] = rows.block
    golds, worths = np.zeros(ROWS, np.float16), np.full(
      ROWS, np.nan, np.float16)
    golds[:count], worths[:count] = gold, worth
    newest = np.full(BRANCHING, -1, np.int32)
    part = self._newest(example)
    newest[BRANCHING - len(part) :] = part
    return dict(
      features=features, block=block, gold=golds, worth=worths,
      asked=np.bool_(example.asked), answerable=np.bool_(len(example.gold) > 0),
      newest=newest, query=query.gist.astype(np.float16),
      cursor=np.int32(tree.cursor))

  def _newest(self, example: Example) -> np.ndarray:
    """The newest tokens of the history once the query stands in it."""
    ids = example.query
    if example.asked and self._lm.tokenizer.has_chat_template:
      text = self._lm.tokenizer.decode(ids)
      ids = self._lm.tokenizer.chat_turn(text, first=False)[0]
    return np.asarray(ids[-BRANCHING:], np.int32)


@dataclasses.dataclass(frozen=True)
class _Query:
  """The part of a `FocusView` that a query is read from."""

  tree: MegaContextTree
  query_ids: np.ndarray
  query_weights: np.ndarray
  query_start: int
  asked: bool
  query_before: np.ndarray | None


def _rows(found: list[int], last: int, rng) -> Rows:
  """Rows as a window might hold them: some raw, some gists, most buried."""
  raw = np.arange(max(0, last - int(rng.integers(1, 29))), last)
  blocks = np.unique(np.concatenate([
    np.array(found[: ROWS - len(raw)], np.int64), raw]))[-ROWS:]
  state = np.where(blocks >= raw[0], RAW, BURIED)
  state[(blocks < raw[0]) & (blocks // BRANCHING == raw[0] // BRANCHING)] = GIST
  if rng.integers(2):  # some that were expanded before, most often the best
    best = np.isin(blocks, found[: int(rng.integers(24))])
    state[best & (rng.random(len(blocks)) < 0.7)] = RAW
    state[rng.permutation(len(blocks))[: int(rng.integers(8))]] = RAW
  return Rows(blocks, state.astype(np.int32), np.zeros(len(blocks), np.int64))


def _gold(blocks: np.ndarray, spans, best) -> np.ndarray:
  """How much of what answers each block holds, [R] in [0, 1].

  Where it is known what the answer was taken from, the rest of what was marked
  as evidence counts `_AROUND`.
  """
  whole = _shares(blocks, spans)
  if not best:
    return whole
  return np.maximum(_AROUND * whole, _shares(blocks, best))


def _shares(blocks: np.ndarray, spans) -> np.ndarray:
  """Share of each block that lies in one of the spans, [R].

  Or of the span, where that is shorter than a block.
  """
  start = blocks * BRANCHING
  out = np.zeros(len(blocks))
  for a, b in spans:
    inside = np.minimum(start + BRANCHING, b) - np.maximum(start, a)
    out = np.maximum(out, np.clip(inside / min(BRANCHING, b - a), 0, 1))
  return out
