"""LensNet as a focus policy: finds blocks, scores them, scores entries.

Two searches, both within a fixed number of nodes, say which blocks may matter:
by token statistics (`focus.similarity`) and by learned keys. LensNet scores
these and the window's own blocks; a coarse entry inherits the best score found
below it, so that an expand path leads down to it. Where no sentence holds
enough words of a question, the sentences that mean most nearly the same are
wished for beside, if the learned keys tell what is alike in meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses

import numpy as np

from mcjax import pretrained
from mcjax.answer import passages, questions
from mcjax.base.load import BaseLM
from mcjax.focus.policy import age_scores
from mcjax.focus.similarity import Similarity
from mcjax.gist.encoder import GistEncoder, load_gistnet
from mcjax.lens import features as lens_rows
from mcjax.lens import meaning, reading
from mcjax.lens import network as lensnet
from mcjax.lens.features import GIST, RAW, LensInputs
from mcjax.lens.keyer import TABLE, LensKeyer
from mcjax.tree import learned_keys as lens_keys
from mcjax.tree.search import TreeSearch, brute_force
from mcjax.types import BRANCHING, McjaxError
from mcjax.window.context_lm import ContextLM
from mcjax.window.focus_view import FocusView

_FOUND = 8  # blocks taken from each search
_NEAREST = 32  # blocks by learned keys whose sentences are compared
_SCAN = 1 << 15  # blocks up to which all keys are read: 1M tokens, 8 MFLOP
_THRESHOLD = 0.2  # as the allocator's; scores below it are no wishes
_ANSWER = 0.5  # score from which a block answers a question
_RIVAL = 0.5  # share of the best score that another block must reach, unless
  # its sentence surely is about the query and holds more of it
_SAME = 0.6  # share of the query that its sentence must hold, of the best one's
_IDLE = -0.3  # score of raw blocks that do not answer it
_UNSURE_GAIN = 3.0  # a question without an answer wishes from 0.007 nats on
_GIST_WORTH = 0.01  # most that a block behind a gist scores without a wish
_NEAR_WORTH = 0.17  # what the newest raw block scores above that
_NEAR_HALF = 256.0  # tokens over which that is halved
_TEXT_PRESSURE = 0.41  # as _PRESSURE, for scores that begin at 0
_EDITS = 4  # wishes for which room is made
_PRESSURE = 0.21  # taken from what is not wished for once slots are short


class LensNetPolicy:
  """Focus scores from LensNet.

  Attributes:
    card: the facts of its weights; None for untrained ones.
    keyer: of the learned keys.
    touched, bytes_read: nodes and bytes of the last call's searches.
    flops_per_node: of a search.
    by_meaning: whether its keys say what is alike in meaning.
    sources: token spans that answer the last call's question.
  """

  def __init__(self, config: lensnet.LensNetConfig, params, lm: BaseLM,
               encoder: GistEncoder, card: dict | None, max_nodes: int = 256):
    self.config, self.params, self.card = config, params, card
    self.keyer = LensKeyer(params, config, lm)
    self.by_meaning = TABLE in params
    self._heads = self.keyer
    if self.by_meaning:
      self._heads = LensKeyer.of_heads(params, config, lm)
    self.flops_per_node = 2 * self.keyer.key_dim
    self._network = {"score": params["score"]}
    self._encoder = encoder
    self._max_nodes = max_nodes
    self._lexical = Similarity(max_nodes)
    self._query: np.ndarray | None = None
    self._search: TreeSearch | None = None
    self._best: list[int] = []
    self._alike: tuple | None = None  # query, blocks, what is alike
    self.touched = 0
    self.bytes_read = 0
    self.sources: tuple[tuple[int, int], ...] = ()

  def reads(self, encoder: GistEncoder) -> bool:
    """Whether it was trained, on gists of this GistNet."""
    card = self.card or {}
    made_for = card.get("refitted_to_gistnet", card.get("gistnet"))
    return made_for == encoder.fingerprint

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score per entry, [E] float32."""
    found, wished = self.found(view), None
    if not view.asked:
      wished = reading.wishes(view, found, self._lexical.candidates())
      found = list(dict.fromkeys([*found, *wished]))
    rows = lens_rows.window_rows(view.context_lm.window, found)
    scores = self.score_rows(view, rows)
    answers = find_answers(view, rows, scores, self._lexical.passages)
    alike: dict[int, passages.Passage] = {}
    if view.asked and not questions.reads_alone(view, answers):
      wished = _wishes(rows, scores, answers)
      answers = {}
    elif view.asked and self.by_meaning:
      sure = questions.certainty(view, answers)
      if sure < questions.SURE:
        alike = self._find_alike(view)
      if sure < questions.UNSURE:  # what the model said is better than nothing
        answers = {} if alike else {
          block: p for block, p in answers.items() if p.own}
    spans = set(passages.spans(answers.values()))
    if alike:
      found += [b for p in alike.values() for b in p.blocks]
      rows = lens_rows.window_rows(
        view.context_lm.window, list(dict.fromkeys(found)))
      scores = _raised(rows, scores, alike)
      answers = alike | answers
      spans |= {(p.tokens.start, p.tokens.stop) for p in alike.values()}
    self.sources = tuple(sorted(spans))
    return entry_scores(view, rows, scores, wished, answers)

  def found(self, view: FocusView) -> list[int]:
    """Blocks that either search proposes."""
    lexical = [b for b, _ in self._lexical.targets(view)]
    self.touched = self._lexical.touched
    self.bytes_read = self._lexical.bytes_read
    found = lexical + self._by_keys(view)[:_FOUND]
    last = view.query_start // BRANCHING
    beside = [b + d for b in found for d in (-1, 1) if 0 <= b + d < last]
    return list(dict.fromkeys(found + beside))

  def score_rows(self, view: FocusView, rows: lens_rows.Rows) -> np.ndarray:
    """Scores [R] float32 of the blocks of `rows`."""
    context = view.context_lm
    size = next(s for s in _sizes(context.window.window) if s >= len(rows))
    inputs = lens_rows.gather(
      view, rows, size, context.token_embeddings, self._encoder)
    match = np.zeros(size, np.float32)
    query = self._heads.query(view.query_ids, view.query_weights)
    keys = self._heads.encode_keys(
      np.maximum(inputs.ids[: len(rows), lens_rows.MARGIN : -lens_rows.MARGIN],
                 0))
    match[: len(rows)] = keys.astype(np.int32) @ query / lensnet.KEY_SCALE**2
    scores = lensnet.apply(self._network, self.config, inputs, match)
    return np.asarray(scores)[: len(rows)]

  def _find_alike(self, view: FocusView) -> dict[int, passages.Passage]:
    """`meaning.find_alike`, once for a query and what the search has found."""
    known = self._alike
    if (known is None or known[0] is not view.query_ids
        or known[1] != self._best):
      alike = meaning.find_alike(view, self.keyer, self._best)
      self._alike = known = view.query_ids, list(self._best), alike
    return known[2]

  def _by_keys(self, view: FocusView) -> list[int]:
    """The blocks with the best learned keys.

    Bounds of 32 unlike keys are loose, so all keys are read as long as that
    is cheap; beyond, the best-first search goes as far as its nodes reach.
    """
    last = view.query_start // BRANCHING
    if not len(view.query_ids) or not last:
      return []
    if view.query_ids is not self._query:
      self._query = view.query_ids
      self._start_search(view, last)
    if self._search is not None:
      before = self._search.touched, self._search.bytes_read
      self._search.run(self._max_nodes)
      self.touched += self._search.touched - before[0]
      self.bytes_read += self._search.bytes_read - before[1]
      self._best = [b for b, _ in self._search.best(_NEAREST)]
    return self._best

  def _start_search(self, view: FocusView, last: int) -> None:
    tree, width = view.tree, self.keyer.key_dim
    query = self.keyer.query(view.query_ids, view.query_weights)
    score = lens_keys.scorer(query)
    self._search = None
    if last <= _SCAN:
      found = brute_force(tree, score, k=_NEAREST, stop_block=last)
      self._best = [b for b, _ in found]
      self.touched += last
      self.bytes_read += last * width
    else:
      self._search = TreeSearch(
        tree, score, k=_NEAREST, stop_block=last, floor=-np.inf,
        read_keys=tree.lens_keys,
        read_bytes=lambda level, n: n * lens_keys.key_width(level, width))

  def warm_up(self, context: ContextLM) -> None:
    """Compiles LensNet for this window."""
    for size in _sizes(context.window.window):
      lensnet.apply(self._network, self.config,
                    empty_inputs(size, self.config.d_model),
                    np.zeros(size, np.float32))
    context.token_embeddings(np.zeros(BRANCHING, np.int32))


def _sizes(window: int) -> tuple[int, ...]:
  """Padded numbers of rows: usual ones, and all a window can hold."""
  most = window + 8 * _FOUND
  return (*(size for size in (128, 256, 384, 512) if size < most), most)


def empty_inputs(size: int, d_model: int) -> LensInputs:
  """Inputs of `size` rows that hold nothing."""
  none = np.full
  return LensInputs(
    none((size, lens_rows.SPAN), -1, np.int32),
    np.zeros((size, d_model), np.float32), np.zeros(size, np.int32),
    np.zeros(size, np.float32), np.zeros(size, bool),
    none(lens_rows.QUERY, -1, np.int32),
    np.zeros(lens_rows.QUERY, np.float32),
    np.zeros(lens_rows.QUERY, np.float32),
    none(BRANCHING, -1, np.int32), np.zeros(BRANCHING, np.float32),
    np.zeros((), np.float32),
    np.zeros((lens_rows.TAIL, d_model), np.float32),
    np.zeros(lens_rows.TAIL, bool),
  )


def find_answers(view: FocusView, rows: lens_rows.Rows, scores: np.ndarray,
                 read: Callable[[FocusView, Iterable[int]],
                                dict[int, passages.Passage]],
                 ) -> dict[int, passages.Passage]:
  """{block: its sentence} of what answers a question, best blocks only.

  Args:
    view: the policy's view.
    rows: blocks of the window, and blocks found below its coarse entries.
    scores: [R] LensNet's, in (-1, 1).
    read: what blocks say on the view's question, see `Similarity.passages`.

  Returns:
    Nothing for a question that no block answers, and for text. Questions that
    were asked before count for nothing, see `passages.statements`.
  """
  likely = _before_query(view, rows) & (scores > _THRESHOLD)
  if not view.asked or not np.any(likely):
    return {}
  score = dict(zip(rows.block[likely].tolist(), scores[likely].tolist()))
  told = passages.statements(read(view, score))
  # The score saturates; what it is the tanh of does not.
  top = min(max((score[block] for block in told), default=0.0), 0.999)
  if top < _ANSWER:
    return {}
  near_top = np.tanh(_RIVAL * np.arctanh(top))
  share = max(p.share for b, p in told.items() if score[b] >= near_top)
  told = {block: p for block, p in told.items()
          if score[block] >= near_top or p.share > max(share, passages.HOLDS)}
  least = _SAME * max(p.share for p in told.values())
  return {block: p for block, p in told.items() if p.share >= least}


def _raised(rows: lens_rows.Rows, scores: np.ndarray,
            answers: dict[int, passages.Passage]) -> np.ndarray:
  """Scores [R] in which blocks that are alike in meaning are wished for.

  Args:
    rows: with the blocks of `answers` behind those that were scored.
    scores: of the first rows.
    answers: what is alike.
  """
  out = np.zeros(len(rows), np.float32)
  out[: len(scores)] = scores
  for block, passage in answers.items():
    at = rows.block == block
    out[at] = np.maximum(out[at], np.float32((1 + passage.share) / 2))
  return out


def _before_query(view: FocusView, rows: lens_rows.Rows) -> np.ndarray:
  """[R] bool: blocks that end before the query begins."""
  return (rows.block + 1) * BRANCHING <= view.query_start


def entry_scores(view: FocusView, rows: lens_rows.Rows, scores: np.ndarray,
                 wished: dict[int, float] | None = None,
                 answers: dict[int, passages.Passage] | None = None,
                 ) -> np.ndarray:
  """Scores of entries [E] from scores of blocks [R].

  A coarse entry takes the best wish found below it. Everything that is not
  wished for scores lower once slots are short of what is.

  Args:
    view: the policy's view.
    rows: blocks of the window, and blocks found below its coarse entries.
    scores: [R] LensNet's, in (-1, 1).
    wished: {block: score} that text which is read on wishes for, see
      `reading.wishes`, or a prompt that asks nothing; None for a question,
      whose wishes are LensNet's alone.
    answers: see `find_answers`.
  """
  scores = np.array(scores, np.float32)
  if answers:
    out = age_scores(dataclasses.replace(view, pressure=False))
    scores = _for_answer(view, rows, scores, answers)
  else:
    out = np.zeros(len(view.entries), np.float32)
    scores = _for_text(view, rows, scores, wished)
  for at, state, score in zip(rows.entry.tolist(), rows.state.tolist(), scores):
    if state == RAW:
      out[at : at + BRANCHING] = score
    elif state == GIST or score > _THRESHOLD:
      # A gist costs one slot; without a wish only its age counts.
      out[at] = max(score, out[at])
  finer = (out > _THRESHOLD) & (view.entries.level > 0)
  room = (BRANCHING - 1) * min(_EDITS, int(np.sum(finer)))
  if answers:
    short, less = 2 * BRANCHING + room, _PRESSURE
  else:
    short, less = BRANCHING + room if room else 0, _TEXT_PRESSURE
  if view.context_lm.window.free < short:
    out = np.where(finer, out, out - np.float32(less))
  return out


def _wishes(rows: lens_rows.Rows, scores: np.ndarray,
            answers: dict[int, passages.Passage]) -> dict[int, float]:
  """{block: score} of the blocks that answering sentences touch."""
  at = dict(zip(rows.block.tolist(), scores.tolist()))
  wished: dict[int, float] = {}
  for block, passage in answers.items():
    for near in passage.blocks:
      wished[near] = max(wished.get(near, 0.0), at[block])
  return wished


def _for_answer(view: FocusView, rows: lens_rows.Rows, scores: np.ndarray,
                answers: dict[int, passages.Passage]) -> np.ndarray:
  """Scores [R] when a question is answered.

  Blocks are wished for that the answering sentences touch. All other text is
  not, and asks to be collapsed where it is raw: together it distracts a small
  model, though each block alone hardly matters.
  """
  wished = _wishes(rows, scores, answers)
  wish = np.array([wished.get(b, 0.0) for b in rows.block.tolist()])
  rest = np.minimum(scores, np.where(rows.state == RAW, _IDLE, 0.0))
  rest[~_before_query(view, rows)] = 0.0
  return np.where(wish > 0, wish, rest).astype(np.float32)


def _for_text(view: FocusView, rows: lens_rows.Rows, scores: np.ndarray,
              wished: dict[int, float] | None) -> np.ndarray:
  """Scores [R] where no block answers: what a block is worth raw.

  Blocks are wished for by `reading.wishes` or, for a question, where LensNet
  sees a gain. All else scores within the threshold and moves only to make room,
  least worth first: gists, which the LM does not see; raw blocks from farther
  back; then the newest raw text, oldest first.
  """
  newest = reading.newest_raw(view.entries)
  raw = rows.state == RAW
  near, far = raw & (rows.entry >= newest), raw & (rows.entry < newest)
  worth = _GIST_WORTH * (1 + scores) / 2
  worth[far] += _GIST_WORTH
  age = view.tree.cursor - (rows.block[near] + 1) * BRANCHING
  worth[near] = 2 * _GIST_WORTH + _NEAR_WORTH * np.exp2(-age / _NEAR_HALF)
  if wished is None:
    wishes = np.tanh(_UNSURE_GAIN * np.arctanh(np.clip(scores, -0.99, 0.99)))
  else:
    wishes = np.array([wished.get(b, 0.0) for b in rows.block.tolist()])
  order = np.where(near, -1.0, wishes)
  least = max(_THRESHOLD, np.sort(order)[-reading.WISHES :].min(initial=1.0))
  best = (order >= least) & (order > _THRESHOLD)
  return np.where(best, wishes, worth).astype(np.float32)


def save_lensnet(path, params, config: lensnet.LensNetConfig, card: dict
                 ) -> None:
  """Writes weights, configuration and the facts of `card` as safetensors."""
  pretrained.save_weights(
    path, "lensnet", params, dataclasses.asdict(config), card)


def _load(lm: BaseLM, source):
  config = lensnet.LensNetConfig(d_model=lm.config.d_model)
  path = source or pretrained.shipped(lm.name, "lensnet")
  if path is not None:
    params, fields, card = pretrained.read_weights(path, "lensnet")
    config = pretrained.laid_out(
      path, params, lensnet.init_params, lensnet.LensNetConfig, fields)
    if config.d_model == lm.config.d_model:
      return params, config, card
    if source is not None:
      raise McjaxError(f"{source}: this LensNet reads vectors of "
                       f"{config.d_model}, but {lm.name} embeds in "
                       f"{lm.config.d_model}")
    config = lensnet.LensNetConfig(d_model=lm.config.d_model)
  return lensnet.init_params(config), config, None


def load_lensnet(lm: BaseLM, path=None, *, gistnet: GistEncoder | None = None,
                 max_nodes: int = 256) -> LensNetPolicy:
  """The LensNet of a base: the given weights, else the shipped, else fresh.

  Args:
    lm: the base.
    path: of a `lensnet.safetensors`; None takes the weights shipped for a base
      of this name, or else deterministic untrained ones.
    gistnet: the base's GistNet; the shipped one by default.
    max_nodes: nodes each search may touch per refocus step.

  Raises:
    McjaxError: the file is missing, unreadable or made for another width.
  """
  params, config, card = _load(lm, path)
  return LensNetPolicy(
    config, params, lm, gistnet or load_gistnet(lm), card, max_nodes=max_nodes
  )


def load_keyer(lm: BaseLM, path=None) -> LensKeyer:
  """The key head of `load_lensnet`'s weights."""
  params, config, _ = _load(lm, path)
  return LensKeyer(params, config, lm)
