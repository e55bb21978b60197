"""LensNet as a focus policy: finds blocks, scores them, scores entries.

Two searches, both within a fixed number of nodes, say which blocks may matter:
by words and by learned keys. LensNet scores these and the window's own blocks.
Its score is the score: a coarse entry inherits the best one found below it, so
that an expand path leads down to it, and what is worth least pays.
"""

from __future__ import annotations

import jax
import numpy as np

from mcjax.answer import turns
from mcjax.answer.matching import Matcher, QueryWords
from mcjax.answer.reading import Reader, chosen
from mcjax.answer.words import WordTable
from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.focus.policy import STAY, WISH, age_scores, with_payment
from mcjax.gist.encoder import GistEncoder, load_gistnet
from mcjax.lens import features as lens_features
from mcjax.lens import network as lensnet
from mcjax.lens import sentence_net
from mcjax.lens.features import RAW, LensQuery, Rows
from mcjax.lens.keyer import TABLE, LensKeyer
from mcjax.lens.sentence_features import candidates, sentence_features
from mcjax.lens.weights import read_weights
from mcjax.pretrained import cards
from mcjax.tree import learned_keys
from mcjax.tree.journal import touched
from mcjax.tree.search import TreeSearch, brute_force, by_keys, by_words
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM
from mcjax.window.focus_view import FocusView

_INVENTED = 2.0  # what an answer from nothing costs, a missed one 1
_SURE = _INVENTED / (1 + _INVENTED)  # from which on something is read
_EVEN = 0.5  # where an answer is as likely as none
FOUND = 64  # blocks taken from each search
_BESIDE = 8  # of these, the best ones with the blocks beside them
_SCAN = 1 << 15  # blocks up to which all keys are read: 1M tokens, 8 MFLOP


class Finder:
  """Both searches of one history for one query, continued while it stays.

  A prompt that follows a turn of the user is searched for by itself and
  together with that turn, with half of the nodes each.
  """

  def __init__(self, tree: MegaContextTree, query: LensQuery, last: int):
    """Begins to look for `query` in the blocks before `last`."""
    self._tree, self._last = tree, last
    parts = [_Part(tree, query.words, query.key, last)]
    if query.joined is not query.words:
      parts.append(_Part(tree, query.joined, query.joined_key, last))
    self._parts = parts

  @property
  def touched(self) -> int:
    """Nodes read so far."""
    return sum(part.touched for part in self._parts)

  @property
  def bytes_read(self) -> int:
    """Bytes of keys read so far."""
    return sum(part.bytes_read for part in self._parts)

  def run(self, max_nodes: int) -> None:
    """Goes on for at most so many nodes in each search."""
    for part in self._parts:
      part.run(max_nodes // len(self._parts))

  def blocks(self) -> list[int]:
    """What was found so far, with the blocks beside the best."""
    own, *joined = self._parts
    first = [b for part in (own, *joined) for b in part.best(FOUND // 2)
             ] if joined else []
    beside = [b + d for b in own.best(_BESIDE) for d in (-1, 1)
              if 0 <= b + d < self._last]
    found = np.array(list(dict.fromkeys(
      [*first, *own.best(FOUND), *beside])), np.int64)
    return found[~touched(self._tree.journal.forgotten, found)].tolist()


class _Part:
  """The searches by words and by keys for one set of words."""

  def __init__(self, tree: MegaContextTree, words: QueryWords,
               key: np.ndarray, last: int):
    self.touched = self.bytes_read = 0
    self._words: TreeSearch | None = None
    if np.any(words.token_weights > 0) and last:
      self._words = by_words(tree, words.token_ids, words.token_weights,
                             k=FOUND, stop_block=last)
    self._keys: TreeSearch | None = None
    self._nearest: list[int] = []
    if last > _SCAN:
      self._keys = by_keys(tree, key, k=FOUND, stop_block=last)
    elif last:
      found = brute_force(
        tree, learned_keys.scorer(key), k=FOUND, stop_block=last)
      self._nearest = [b for b, _ in found]
      self.touched, self.bytes_read = last, last * len(key)

  def run(self, max_nodes: int) -> None:
    """Goes on for at most so many nodes in each search."""
    for search in (self._words, self._keys):
      if search is not None:
        before = search.touched, search.bytes_read
        search.run(max_nodes)
        self.touched += search.touched - before[0]
        self.bytes_read += search.bytes_read - before[1]

  def best(self, count: int) -> list[int]:
    """The best `count` blocks of each search so far."""
    words = [b for b, _ in self._words.best(count)] if self._words else []
    if self._keys is not None:
      return [*words, *(b for b, _ in self._keys.best(count))]
    return [*words, *self._nearest[:count]]


class LensNetPolicy:
  """Focus scores from LensNet.

  Attributes:
    card: the facts of its weights; None for untrained ones.
    keyer: of the learned keys.
    touched, bytes_read: nodes and bytes of the last call's searches.
    flops_per_node: of a search.
    by_meaning: whether its keys say what is alike in meaning.
    sources: token spans that answer the last call's prompt.
    answerable: how surely the history does, in [0, 1].
    denies: whether trained weights say that it rather does not.
  """

  def __init__(self, config: lensnet.LensNetConfig, params, lm: BaseLM,
               encoder: GistEncoder, card: dict | None):
    self.config, self.params, self.card = config, params, card
    self.keyer = LensKeyer(params, config, lm)
    self.by_meaning = TABLE in params
    self.flops_per_node = 2 * self.keyer.key_dim
    self._prompts = params["score"], params["apart"]
    self._reading = params["text"], np.zeros(len(lensnet.APART), np.float32)
    self._read = params.get(sentence_net.PART)
    self.bind(encoder, cards.settled(Config(), lm.name))
    self._tree: MegaContextTree | None = None
    self._query_ids: np.ndarray | None = None
    self._evidence: list[tuple[int, float]] = []
    self._chosen: tuple[tuple[int, int], ...] = ()
    self._whole: dict[int, float] = {}
    self._scored: dict[int, float] = {}
    self._scored_at = -1  # the cursor then
    self._table = WordTable(
      lm.tokenizer, self.keyer.vectors, self.keyer.salience)
    self.touched = 0
    self.bytes_read = 0
    self.answerable, self.denies = 0.0, False

  def bind(self, encoder: GistEncoder, config: Config) -> None:
    """Takes up a history's GistNet, and what its loop is to search and read.

    Args:
      encoder: reads its gists from now on.
      config: of the loop, settled by the base's card.
    """
    self._encoder = encoder
    self._step_nodes = config.search_nodes
    self._prompt_nodes = config.search_nodes * max(1, config.settle_steps)
    self._read_tokens, self._read_share = config.read_tokens, config.read_share

  def reads(self, encoder: GistEncoder) -> bool:
    """Whether it was trained, on gists of this GistNet if it reads any."""
    card = self.card or {}
    if not self.config.gists:
      return "steps" in card
    return card.get("gistnet") == encoder.fingerprint

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score per entry, [E] float32.

    A prompt is searched for at once, as far as all its refocus steps may, so
    its blocks are scored once and keep that while the window settles.
    """
    self._prepare(view)
    if not view.asked:
      self._finder.run(self._step_nodes)
    elif self._scored_at < 0:
      self._finder.run(self._prompt_nodes)
    self.touched = self._finder.touched - self._counted[0]
    self.bytes_read = self._finder.bytes_read - self._counted[1]
    self._counted = self._finder.touched, self._finder.bytes_read
    found = self._finder.blocks()
    rows = lens_features.window_rows(
      view.context_lm.window, [*found, *self._whole], view.query_start)
    if not view.asked or view.tree.cursor != self._scored_at or any(
        block not in self._scored for block in found):
      self._scored = dict(zip(
        rows.block.tolist(), self.score_rows(view, rows).tolist()))
      self._scored_at = view.tree.cursor
    scores = np.array(  # what was seen since was not found: no wish
      [self._scored.get(b, -1.0) for b in rows.block.tolist()], np.float32)
    evidence: list[tuple[int, float]] = []
    if view.asked and self.answerable >= _SURE:  # else nothing is read
      evidence = _evidence(rows, scores)
    if evidence != self._evidence:
      self._evidence, self._chosen = evidence, self._choose(evidence)
      self._whole = self._sentences(view, evidence[0][1] if evidence else -1.0)
    wished = np.array(
      [self._whole.get(b, -1.0) for b in rows.block.tolist()], np.float32)
    return entry_scores(view, rows, np.maximum(scores, wished))

  def _sentences(self, view: FocusView, score: float) -> dict[int, float]:
    """{block: score} of all blocks of the sentences that would be read.

    A sentence goes on where its block ends, and is read as a whole. What the
    user said in a turn is read with its role.
    """
    last = view.query_start // BRANCHING
    spans = list(self.sources)
    for a, b in self.sources:
      spans += turns.frame(view.tree, self._table.tokenizer, a, b)
    return {block: score for a, b in spans
            for block in range(a // BRANCHING, -(-b // BRANCHING))
            if block < last}

  def score_rows(self, view: FocusView, rows: Rows) -> np.ndarray:
    """Scores [R] float32 of the blocks of `rows`; sets `answerable`."""
    context: ContextLM = view.context_lm
    size = next(s for s in _sizes(context.window.window) if s >= len(rows))
    tail = lens_features.read_tail(
      view.tree, context.token_embeddings, self._query)
    inputs = lens_features.gather(
      view.tree, rows, size, self._query, self._matcher, tail)
    weights = self._prompts if view.asked else self._reading
    scores, answerable = jax.device_get(
      lensnet.apply(*weights, self.config, inputs))
    judged = view.asked and len(rows) > 0
    self.answerable = float(answerable) if judged else 0.0
    self.denies = (judged and self.answerable < _EVEN
                   and "steps" in (self.card or {}))
    return scores[: len(rows)]

  @property
  def sources(self) -> tuple[tuple[int, int], ...]:
    """Token spans of the sentences that answer the last call's prompt."""
    return self._chosen if self.answerable >= _SURE else ()

  def _choose(self, evidence: list[tuple[int, float]]
              ) -> tuple[tuple[int, int], ...]:
    """Token spans of the sentences that tell the answer, in order.

    By the share of the prompt's words where the weights have no better way.
    """
    if self._read is None:
      return self._reader.spans(
        evidence, self._query.words, self._read_tokens, self._stop,
        self._read_share)
    spans, strength = candidates(self._reader, evidence, self._stop)
    if not spans:
      return ()
    likely = sentence_net.likelihood(self._read, sentence_features(
      self._matcher, self._query, spans, strength))
    return chosen(dict(zip(spans, likely.tolist())), self._read_tokens,
                  self._read_share)

  def take_in(self, tree: MegaContextTree, context: ContextLM) -> None:
    """Counts words; else the first prompt would."""
    del context
    self._turn_to(tree)
    self._matcher.count_words()

  def _turn_to(self, tree: MegaContextTree) -> None:
    """Begins anew for another history."""
    if tree is not self._tree:
      self._tree, self._query_ids = tree, None
      self._matcher = Matcher(tree, self._table)
      self._reader = Reader(tree, self._table.tokenizer, self._matcher)

  def _prepare(self, view: FocusView) -> None:
    """Begins anew for another history, query or blocks."""
    self._turn_to(view.tree)
    last = view.query_start // BRANCHING
    self._stop = view.query_start
    if view.query_ids is not self._query_ids:
      self._query_ids = view.query_ids
      self._query = lens_features.read_query(
        self._matcher, self.keyer, self._encoder, self._table.tokenizer, view)
      self._finder = Finder(view.tree, self._query, last)
      self._counted, self._whole, self._scored_at = (0, 0), {}, -1
      self._evidence, self._chosen = [], ()

  def warm_up(self, context: ContextLM) -> None:
    """Compiles LensNet for this window."""
    for size in _sizes(context.window.window):
      lensnet.apply(*self._prompts, self.config, lens_features.empty_inputs(
        size, self.config.d_model))
    if self._read is not None:
      sentence_net.warm_up(self._read)
    context.token_embeddings(np.zeros(BRANCHING, np.int32))


def _sizes(window: int) -> tuple[int, ...]:
  """Padded numbers of rows: usual ones, and all a window can hold."""
  most = window + 4 * FOUND
  return (*(size for size in (160, 256, 512) if size < most), most)


def _evidence(rows: Rows, scores: np.ndarray) -> list[tuple[int, float]]:
  """(block, score) of the blocks that are wished for, best first."""
  wished = np.flatnonzero(scores > WISH)
  order = wished[np.argsort(-scores[wished], kind="stable")]
  return list(zip(rows.block[order].tolist(), scores[order].tolist()))


def entry_scores(view: FocusView, rows: Rows, scores: np.ndarray
                 ) -> np.ndarray:
  """Scores of entries [E] from scores of blocks [R].

  A coarse entry takes the best wish found below it, a raw block its own score;
  what is not wished for keeps its age's, so that nothing collapses but to make
  room, the least worth first.

  Args:
    view: the policy's view.
    rows: blocks of the window, and blocks found below its coarse entries.
    scores: [R] LensNet's, in (-1, 1).
  """
  out = age_scores(view)
  for at, state, score in zip(
      rows.entry.tolist(), rows.state.tolist(), scores.tolist()):
    if state == RAW:
      least = out[at : at + BRANCHING] if not view.asked else STAY
      out[at : at + BRANCHING] = np.maximum(score, least)
    elif state != RAW and score > WISH:
      out[at] = max(score, out[at])
  return with_payment(view, out)


def load_lensnet(lm: BaseLM, path=None, *, gistnet: GistEncoder | None = None
                 ) -> LensNetPolicy:
  """The LensNet of a base: the given weights, else the shipped, else fresh.

  Args:
    lm: the base.
    path: of a `lensnet.safetensors`; None takes the weights shipped for a base
      of this name, or else deterministic untrained ones.
    gistnet: the base's GistNet; the shipped one by default.

  Raises:
    McjaxError: the file is missing, unreadable or made for another width.
  """
  params, config, card = read_weights(lm, path)
  return LensNetPolicy(config, params, lm, gistnet or load_gistnet(lm), card)


def load_keyer(lm: BaseLM, path=None) -> LensKeyer:
  """The key head of `load_lensnet`'s weights."""
  params, config, _ = read_weights(lm, path)
  return LensKeyer(params, config, lm)
