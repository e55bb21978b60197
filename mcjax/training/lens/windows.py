"""Windows that LensNet learns from: what it reads, what each block is worth.

A window is made from a stored tree alone, without running the base: blocks
that the searches find and some raw ones, their features, and labels by
construction (`histories.py`). One file a history; files that are there are not
made again, so an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Any
import uuid

from etils import epath
import numpy as np

from mcjax.answer.matching import Matcher, WordTable
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
from mcjax.training.lens.losses import Targets
from mcjax.training.lens.prompts import Example, History
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.focus_view import fading_weights

ROWS = 160  # of a window at most
NODES = 256  # of a search
_AROUND = 0.3  # of evidence around the sentence that answers
_COPY = 3  # tokens of which the last one is foretold by the others
_GAIN = 20.0  # focus score's logit for every foretold share of the next tokens


@dataclasses.dataclass
class WindowSet:
  """N windows on several histories.

  Attributes:
    features: [N, ROWS, FEATURES] float16.
    block: [N, ROWS] int32; -1 for padding.
    gold: [N, ROWS] float16 how much of what answers the prompt a block holds.
    worth: [N, ROWS] float16 score in [-1, 1] while text is read on.
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
    table: of the words met so far.
  """

  def __init__(self, lm: BaseLM, encoder: GistEncoder, keyer: LensKeyer,
               seed: int = 0):
    self._lm, self.encoder, self._keyer = lm, encoder, keyer
    self._seed = seed
    self.table = WordTable(lm.tokenizer, keyer.vectors, keyer.salience)

  def write(self, path: epath.Path, history: History, number: int) -> None:
    """Writes the windows of a history, in one atomic step."""
    rng = np.random.default_rng([self._seed, 9, number])
    found: list[dict] = []
    examples = sorted(history.examples, key=lambda e: e.cursor)
    if not examples:
      return
    self.table.clear()  # a word's vector is that of where it stood first
    tree = self.tree(history.ids[: examples[0].cursor])
    matcher = Matcher(tree, self.table)
    for example in examples:
      if tree.cursor < example.cursor:
        tree.append(history.ids[tree.cursor : example.cursor])
      if tree.num_nodes(1) >= BRANCHING and len(example.query):
        found.append(self._window(tree, matcher, example, rng))
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
    tree.append(ids)
    return tree

  def look(self, tree: MegaContextTree, matcher: Matcher, example: Example,
           rng) -> tuple[LensQuery, Rows]:
    """The query of an example, and the rows of a window made for it."""
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
    return query, _rows(finder.blocks(), last, rng)

  def _window(self, tree: MegaContextTree, matcher: Matcher, example: Example,
              rng) -> dict:
    query, rows = self.look(tree, matcher, example, rng)
    count = len(rows)
    features = np.zeros((ROWS, FEATURES), np.float16)
    features[:count] = lens_features.row_features(tree, rows, query, matcher)
    block = np.full(ROWS, -1, np.int32)
    block[:count] = rows.block
    gold, worth = np.zeros((2, ROWS), np.float16)
    gold[:count] = _gold(rows.block, example.gold, example.best)
    if len(example.future):
      worth[:count] = _worth(tree, rows, example.future)
    newest = np.full(BRANCHING, -1, np.int32)
    part = self._newest(example)
    newest[BRANCHING - len(part) :] = part
    return dict(
      features=features, block=block, gold=gold, worth=worth,
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


def _worth(tree: MegaContextTree, rows: Rows, future: np.ndarray) -> np.ndarray:
  """Scores [R] of blocks by what they foretell of the next tokens.

  A token is foretold by a block that holds it behind the same two tokens, as a
  copying model would use it; what the raw text foretells counts for nothing.
  """
  context = np.concatenate([
    tree.tokens(tree.cursor - _COPY + 1, tree.cursor), future]).astype(np.int64)
  wanted = _grams(context)
  raw = rows.block[rows.state == RAW]
  shown = np.concatenate([np.zeros(0, np.int64), *(
    _grams(tree.tokens(max(0, b * BRANCHING - _COPY),
                       (b + 1) * BRANCHING).astype(np.int64))
    for b in raw.tolist())])
  new = ~np.isin(wanted, shown)
  out = np.full(len(rows), -0.3, np.float32)
  for i, b in enumerate(rows.block.tolist()):
    low = max(0, b * BRANCHING - _COPY)
    grams = _grams(tree.tokens(low, (b + 1) * BRANCHING).astype(np.int64))
    held = np.isin(wanted, grams)
    if rows.state[i] != RAW:
      held &= new
    share = held.mean()
    if share > 1 / len(wanted):  # one alone is chance
      out[i] = np.tanh(_GAIN * share)
  return out


def _grams(ids: np.ndarray) -> np.ndarray:
  """Every run of `_COPY` token ids as one number."""
  out = np.zeros(max(0, len(ids) - _COPY + 1), np.int64)
  for k in range(_COPY):
    out = out * (1 << 20) + ids[k : k + len(out)]
  return out
