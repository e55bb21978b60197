"""Passages: the sentence of a block that a question is about.

Blocks end where 32 tokens end, sentences do not. A small model is easily
distracted by what stands around a fact, so where a block answers a question
only the blocks are wanted that its sentence touches, and of these the model
reads the sentence alone. A line that is no sentence, as a heading or one of
code, goes on with what follows, and so does a question, whose answer may
follow. A question that ends its turn of a chat tells nothing, and neither a
question nor what the model itself has said counts beside other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
from typing import NamedTuple

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.tree import lexical_rank
from mcjax.tree.journal import overlaps
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING

_REACH = 16  # tokens of a sentence beyond the outermost that the query shares
_FOLLOWS = 32  # tokens that go on behind these where a line is no sentence
HOLDS = 0.3  # of the query, from which a statement surely is about it
_ANSWER = 512  # tokens back to where an answer of the model opened, at most
_BEST = 0.8  # share of the best passage's share that is read beside it
_STOPS = (".", "!", "?")
_CLOSING = "\"')]*_"  # may stand between a full stop and the blank behind it


class Passage(NamedTuple):
  """What a block says on a query.

  Attributes:
    share: of the query's weight in its best sentence, in [0, 1]; for one that
      is found by meaning its likeness to the query, in [-1, 1].
    blocks: L1 blocks that this sentence touches, the block and those beside it
      at most.
    tokens: of the history, this sentence as far as it is near to what it
      shares with the query, with what follows a question or a line that is no
      sentence; the whole block where they share nothing.
    asks: this sentence is a question itself.
    own: the model itself said this sentence in an earlier answer.
  """

  share: float
  blocks: range
  tokens: range
  asks: bool = False
  own: bool = False


def sentence_ends(pieces: list[str]) -> np.ndarray:
  """Whether a sentence or line ends with a token, [T] bool.

  Args:
    pieces: [T] tokens as text, see `Tokenizer.pieces`.
  """
  out = np.zeros(len(pieces), bool)
  for i, piece in enumerate(pieces):
    follows = pieces[i + 1][:1] if i + 1 < len(pieces) else " "
    out[i] = _closed(piece) and follows.isspace() or "\n" in piece
  return out


def _closed(text: str) -> bool:
  """Whether text ends as a sentence does."""
  return text.rstrip().rstrip(_CLOSING).endswith(_STOPS)


def is_question(pieces: list[str], special: np.ndarray) -> bool:
  """Whether a sentence [T] of tokens as text ends with a question mark.

  Args:
    pieces: [T] tokens as text.
    special: [T] bool, tokens that stand for no text.
  """
  words = "".join(p for p, skip in zip(pieces, special) if not skip)
  return words.rstrip().rstrip(_CLOSING).endswith("?")


def _only_asks(pieces: list[str], special: np.ndarray, start: int, stop: int
               ) -> bool:
  """Whether [start, stop) is a question, and nothing follows in its turn."""
  if not is_question(pieces[start:stop], special[start:stop]):
    return False
  text = ~special & np.array([bool(piece.strip()) for piece in pieces])
  end = start + int(np.flatnonzero(text[start:stop])[-1]) + 1
  turns = end + np.flatnonzero(special[end:])
  return not np.any(text[end : turns[0] if len(turns) else len(text)])


def _own(tree: MegaContextTree, tokenizer: Tokenizer, start: int,
         ids: np.ndarray) -> np.ndarray:
  """Which of the tokens [T] from `start` the model itself said, [T] bool.

  Told by the template's words that open an answer, `_ANSWER` tokens back at
  most, without a control token since.
  """
  opening = tokenizer.answer_ids
  if not len(opening):
    return np.zeros(len(ids), bool)
  low = max(0, start - _ANSWER)
  all_ids = np.concatenate([tree.tokens(low, start), ids])
  at = np.arange(len(all_ids))
  opened = np.zeros(len(all_ids), bool)
  if len(all_ids) > len(opening):
    windows = np.lib.stride_tricks.sliding_window_view(
      all_ids[:-1], len(opening))
    opened[len(opening) :] = np.all(windows == opening, axis=1)
  since = np.maximum.accumulate(np.where(opened, at, -1))
  special = np.isin(all_ids, list(tokenizer.special_ids))
  control = np.maximum.accumulate(np.where(special, at, -1))
  return ((since >= 0) & (control < since))[start - low :]


def statements(passages: dict[int, Passage]) -> dict[int, Passage]:
  """Those that may answer: told by the text, unless the best one is not.

  In a conversation earlier questions of the same wording, and what the model
  answered, share more with a new question than most facts do. Where the text
  holds `HOLDS` of the query the model's words are left out, right or wrong, and
  a question, which leads to its answer on a page of questions and answers,
  counts no more than the text. Both are left out, too, where they hold less
  than that, and so is what shares nothing.
  """
  told = {b: p for b, p in passages.items()
          if p.share > 0 and not (p.asks or p.own)}
  found = told | {b: p for b, p in passages.items()
                  if p.share >= HOLDS and (p.asks or p.own)}
  top = max((p.share for p in told.values()), default=0.0)
  if top >= HOLDS:
    found = {b: p for b, p in found.items() if not p.own}
  if top >= max((p.share for p in found.values()), default=0.0):
    return told
  if top >= HOLDS:
    found = {b: p._replace(share=min(p.share, top)) for b, p in found.items()}
  return found


def best_sentences(passages: dict[int, Passage], count: int
                   ) -> dict[int, Passage]:
  """The blocks of the `count` best sentences, best first, questions last."""
  ranked = sorted(
    passages, key=lambda b: (-passages[b].share, passages[b].asks))
  kept = list(dict.fromkeys(passages[b].tokens for b in ranked))[:count]
  return {b: passages[b] for b in ranked if passages[b].tokens in kept}


def spans(passages: Iterable[Passage]) -> tuple[tuple[int, int], ...]:
  """Token spans (start, stop) of the best passages, in order, none twice.

  A passage that shares less of the query than the best one may be worth a
  look, but beside that one it is read for the answer too easily.
  """
  found = list(passages)
  least = _BEST * max((p.share for p in found), default=0.0)
  return tuple(sorted({
    (p.tokens.start, p.tokens.stop) for p in found if p.share >= least}))


def find_passages(
  tree: MegaContextTree, tokenizer: Tokenizer, blocks: Iterable[int],
  query_ids: np.ndarray, weights: np.ndarray, stop: int,
) -> dict[int, Passage]:
  """The passage of each block; reads 96 tokens a block.

  Args:
    tree: the history.
    tokenizer: of the base.
    blocks: indices of L1 nodes before `stop`.
    query_ids: int [Q].
    weights: float [Q], see `keys.query_weights`.
    stop: token at which the query begins; nothing from there on is read.
  """
  shared = query_ids[weights > 0]
  out = {}
  for block in blocks:
    start, ids, pieces, special, said, sentences = _around(
      tree, tokenizer, block, stop)
    sentences = [s for s in sentences if not _only_asks(pieces, special, *s)]
    shares = lexical_rank.coverage(
      query_ids, weights, _padded(ids, sentences), np.ones(len(ids)))
    if shares.max(initial=0.0) == 0.0:
      tokens = range(block * BRANCHING, (block + 1) * BRANCHING)
      out[block] = Passage(0.0, range(block, block + 1), tokens)
      continue
    asks = np.array([
      is_question(pieces[a:b], special[a:b]) for a, b in sentences])
    own = np.array([said[a] for a, _ in sentences])
    told = np.where(asks | own, 0.0, shares)
    best = int(np.argmax(told if told.max() >= HOLDS else shares))
    a, b = sentences[best]
    held = a + np.flatnonzero(np.isin(ids[a:b], shared))
    end = int(held[-1]) + 1
    if asks[best] or not _closed(pieces[b - 1]):
      end = b if asks[best] else end
      turns = end + np.flatnonzero(special[end:])  # a chat's turn ends here
      b = min([end + _FOLLOWS, len(ids), *turns.tolist()])
    else:
      b = min(b, end + _REACH)
    tokens = range(start + max(a, int(held[0]) - _REACH), start + b)
    out[block] = Passage(float(shares[best]), _touched(tokens), tokens,
                         bool(asks[best]), bool(own[best]))
  return out


class PassageReader:
  """`find_passages` for one query, every block read once.

  A question is looked at again at every refocus step, and most of its likely
  blocks are the same ones then.
  """

  def __init__(self, tree: MegaContextTree, tokenizer: Tokenizer,
               query_ids: np.ndarray, weights: np.ndarray, stop: int):
    self._find = functools.partial(
      find_passages, tree, tokenizer, query_ids=query_ids, weights=weights,
      stop=stop)
    self._known: dict[int, Passage] = {}

  def find(self, blocks: Iterable[int]) -> dict[int, Passage]:
    """The passage of each block, in the order given."""
    blocks = list(blocks)
    self._known |= self._find([b for b in blocks if b not in self._known])
    return {block: self._known[block] for block in blocks}


def nearest_sentences(
  tree: MegaContextTree, tokenizer: Tokenizer, blocks: Iterable[int],
  likeness: Callable[[np.ndarray], np.ndarray], stop: int,
) -> dict[int, Passage]:
  """The sentence of each block that means most nearly what is asked.

  What is most like a question is an earlier question, or the model's answer to
  it; both are left out, and blocks that hold nothing else.

  Args:
    tree, tokenizer, blocks, stop: as for `find_passages`.
    likeness: sentences int [n, T], -1 for no token, to [n] in [-1, 1].
  """
  out = {}
  for block in blocks:
    near = _around(tree, tokenizer, block, stop)
    told = [(a, b) for a, b in near.sentences if not near.own[a]
            and not is_question(near.pieces[a:b], near.special[a:b])]
    if told:
      shares = likeness(_padded(near.ids, told))
      a, b = told[int(np.argmax(shares))]
      tokens = range(near.start + a, near.start + b)
      out[block] = Passage(float(shares.max()), _touched(tokens), tokens)
  return out


class _Near(NamedTuple):
  """A block's tokens and those of the blocks beside it.

  Attributes:
    start: place in the history of the first.
    ids: [T] int32.
    pieces: [T] as text.
    special: [T] bool, control tokens.
    own: [T] bool, what the model itself said.
    sentences: (start, stop) in these of what touches the block; a turn of a
      chat ends a sentence too. None of what is forgotten.
  """

  start: int
  ids: np.ndarray
  pieces: list[str]
  special: np.ndarray
  own: np.ndarray
  sentences: list[tuple[int, int]]


def _around(tree: MegaContextTree, tokenizer: Tokenizer, block: int, stop: int
            ) -> _Near:
  start = max(0, (block - 1) * BRANCHING)
  ids = tree.tokens(start, min(stop, (block + 2) * BRANCHING))
  pieces = tokenizer.pieces(ids)
  special = np.isin(ids, list(tokenizer.special_ids))
  own = _own(tree, tokenizer, start, ids)
  ends = sentence_ends(pieces) | special
  ends[:-1] |= own[1:] & ~own[:-1]  # an answer opens
  places, journal = np.arange(start, start + len(ids)), tree.journal
  gone = overlaps(journal.forgotten, places, places + 1)
  ends[:-1] |= journal.edges(start + 1, start + len(ids))  # of documents
  edges = [0, *(np.flatnonzero(ends) + 1).tolist(), len(pieces)]
  at = block * BRANCHING - start
  sentences = [(a, b) for a, b in zip(edges[:-1], edges[1:])
               if a < b and a < at + BRANCHING and b > at and not gone[a]]
  return _Near(start, ids, pieces, special, own, sentences)


def _padded(ids: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
  """The ids of spans, [n, T] int64, -1 behind each."""
  out = np.full((len(spans), len(ids)), -1, np.int64)
  for row, (a, b) in zip(out, spans):
    row[: b - a] = ids[a:b]
  return out


def _touched(tokens: range) -> range:
  """The blocks that a span of tokens touches."""
  return range(tokens.start // BRANCHING, (tokens.stop - 1) // BRANCHING + 1)
