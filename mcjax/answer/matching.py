"""How well blocks match a query: word by word, in spelling and in meaning.

A block ends where 32 tokens end, a word does not, and a token sequence changes
with case and with the blank before it. So blocks and query are compared as
case-folded words: which words of the query a block holds (weighted by rarity),
which words are spelled nearly alike (character trigrams), and which mean
nearly the same (the learned vectors of their tokens). Nothing here knows a
language.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mcjax.answer import turns
from mcjax.answer.words import MARGIN, WordCounts, WordTable
from mcjax.tree import lexical_rank
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING

REACH = 2  # blocks on each side that a block is read with
MARKS = ("said_by_user", "said_by_model", "special", "question_mark")
_MOST_BLOCKS = 1 << 14  # blocks whose words are kept
_MOST_WORDS = 1 << 17  # words that are kept


class QueryWords(NamedTuple):
  """The words of a query.

  Attributes:
    ids: [Q] int32, see `WordTable`.
    weights: [Q] float32 prior times rarity (idf); a repeated word counts once.
    known: share of the weight in words that some block may hold.
    token_ids: [T] int32 the query as it stands, then its words in lower case,
      capitalised and in upper case, with and without a blank before.
    token_weights: [T] float32 prior times rarity of these; 0 keeps two apart.
  """

  ids: np.ndarray
  weights: np.ndarray
  known: float
  token_ids: np.ndarray
  token_weights: np.ndarray


class Matches(NamedTuple):
  """Per block and query word, the best match of any word of the block, [U, Q].

  Attributes:
    exact: 1 where the block holds the word.
    spelling: trigram likeness (Jaccard), in [0, 1].
    meaning: cosine of the words' vectors, in [0, 1].
    times: how often the block holds the word.
    pairs: [U, Q - 1] 1 where it holds a word and the query's next one behind.
  """

  exact: np.ndarray
  spelling: np.ndarray
  meaning: np.ndarray
  times: np.ndarray
  pairs: np.ndarray


class Sentence(NamedTuple):
  """What is compared of a sentence.

  Attributes:
    words: [n] int32 numbers of its words, in order.
    counts: [n] float32 how much each of them says (salience).
    key: [K] float32 sum over its tokens, of length 1.
    text: of it.
    tokens: that it has.
  """

  words: np.ndarray
  counts: np.ndarray
  key: np.ndarray
  text: str
  tokens: int


class Matcher:
  """Matches blocks of one tree with queries.

  Keeps what it has read for as long as the tree only grows.
  """

  def __init__(self, tree: MegaContextTree, table: WordTable):
    self._tree, self.table = tree, table
    self._clear()

  def _clear(self) -> None:
    self._words: dict[int, np.ndarray] = {}
    self._counts = WordCounts(self._tree, self.table)
    self._marks: dict[int, np.ndarray] = {}
    self._keys: dict[int, np.ndarray] = {}
    self._gists: dict[int, np.ndarray] = {}
    self._sentences: dict[tuple[int, int], Sentence] = {}
    self._revision = self._tree.revision

  def _renew(self) -> None:
    """Drops what may have been taken back or written anew since."""
    if self._revision != self._tree.revision:
      self._clear()

  def count_words(self) -> None:
    """Counts words in a sample of the blocks; else the next query would."""
    self._renew()
    self._counts.count((), self.blocks)

  def query(self, token_ids: np.ndarray, prior: np.ndarray,
            stop: int | None = None) -> QueryWords:
    """The words of query tokens [T] with prior weights [T].

    They are as rare as the blocks before `stop` say, all of them by default: a
    prompt that is in the tree itself holds all of its words. A word is at
    most as frequent as its tokens would say if they were independent, and as a
    count in a sample of these blocks says, where that counts as one block more.
    """
    self._renew()
    if len(self.table) > _MOST_WORDS:
      self.table.clear()
      self._words.clear()
      self._sentences.clear()
    tokenizer = self.table.tokenizer
    words = self.table.read(token_ids)
    numbers = self.table.numbers(words, token_ids)
    last = self._blocks_before(stop)
    blocks = max(1, last)
    seen, sampled = self._counts.count([word for word, _, _ in words], last)
    ids, weights = [], []
    # Sequences of tokens with their priors; 0 between two keeps them apart.
    spelled = [(token_ids, np.asarray(prior, np.float32))]
    known = total = 0.0
    for (word, a, _), number, times in zip(words, numbers.tolist(), seen):
      if number in ids:
        continue
      expected = 0.0
      for text in _forms(word):
        tokens = np.asarray(tokenizer.encode(text), np.int32)
        if not len(tokens):
          continue
        share = self._tree.block_frequency(np.unique(tokens), stop) / blocks
        expected += float(np.prod(share))
        between = np.zeros(1, np.float32)
        spelled.append((np.concatenate([tokens[:1], tokens]), np.concatenate(
          [between, np.full(len(tokens), prior[a], np.float32)])))
      held = blocks * min(expected, (times + expected) / (sampled + 1))
      weight = max(0.0, float(prior[a]) * np.log((blocks + 1) / (held + 0.5)))
      total += weight
      known += weight if expected else 0.0
      ids.append(number)
      weights.append(weight)
    sequence, priors = map(np.concatenate, zip(*spelled))
    return QueryWords(
      np.array(ids, np.int32), np.array(weights, np.float32),
      known / total if total else 0.0, sequence.astype(np.int32),
      lexical_rank.query_weights(self._tree, sequence, priors, stop))

  def blocks_around(self, blocks: np.ndarray, stop: int | None = None
                    ) -> np.ndarray:
    """Sorted blocks within `REACH` of `blocks`, those of the tree.

    Only those before `stop`, if it is given.
    """
    near = blocks[:, None] + np.arange(-REACH, REACH + 1)
    near = np.unique(near)
    return near[(near >= 0) & (near < self._blocks_before(stop))]

  def _blocks_before(self, stop: int | None) -> int:
    return self.blocks if stop is None else min(stop, self.blocks)

  def match(self, blocks: np.ndarray, query: QueryWords) -> Matches:
    """Matches of blocks [U], sorted, with the query's words."""
    self._renew()
    lists = self._read(blocks)
    counts = np.array([len(words) for words in lists])
    flat = np.concatenate([*lists, np.zeros(0, np.int32)])
    words, where = np.unique(flat, return_inverse=True)
    q = query.ids
    same = words[:, None] == q[None]
    table = self.table
    some = counts > 0
    starts = (np.cumsum(counts) - counts)[some]

    def per_block(values: np.ndarray, reduce=np.maximum) -> np.ndarray:
      out = np.zeros((len(blocks), values.shape[1]), np.float32)
      if len(starts):
        out[some] = reduce.reduceat(values, starts, axis=0)
      return out

    here = same[where]
    pairs = np.zeros((len(flat), max(0, len(q) - 1)), bool)
    pairs[:-1] = here[:-1, :-1] & here[1:, 1:]
    spelling = table.spelling(words, q).astype(np.float32)
    meaning = table.meaning(words, q).astype(np.float32)
    return Matches(
      per_block(here.astype(np.float32)), per_block(spelling[where]),
      per_block(meaning[where]), per_block(here.astype(np.float32), np.add),
      per_block(pairs.astype(np.float32)))

  @property
  def blocks(self) -> int:
    """Complete blocks of the history."""
    return self._tree.num_nodes(1)

  def marks(self, blocks: np.ndarray) -> np.ndarray:
    """Whose words blocks [n] hold, and whether one asks; float32 [n, MARKS].

    Shares of a block's tokens that the user and the model said in a chat, and
    of control tokens; 1 for a block with a question mark.
    """
    self._renew()
    missing = np.unique([b for b in blocks.tolist() if b not in self._marks])
    if len(self._marks) > _MOST_BLOCKS:
      self._marks.clear()
      missing = np.unique(blocks)
    chat = turns.has_turns(self._tree, self.table.tokenizer)
    special = list(self.table.tokenizer.special_ids)
    for run in (missing[at] for at in runs_of(missing)):
      start = int(run[0]) * BRANCHING
      stop = (int(run[-1]) + 1) * BRANCHING
      ids = self._tree.tokens(start, stop)
      who = np.zeros(len(ids), np.int8)
      if chat:
        who = turns.speakers(self._tree, self.table.tokenizer, start, stop)
      self._mark(run, ids, who, np.isin(ids, special))
    return np.array([self._marks[b] for b in blocks.tolist()],
                    np.float32).reshape(-1, len(MARKS))

  def keys(self, blocks: np.ndarray) -> np.ndarray:
    """Learned keys of blocks [n]: int8 [n, K]."""
    self._renew()
    return _rows(blocks, self._keys, self._tree.lens_keys)

  def gists(self, blocks: np.ndarray) -> np.ndarray:
    """L1 gists of blocks [n]: float32 [n, D]."""
    self._renew()
    return _rows(blocks, self._gists, self._tree.gists)

  def sentence(self, span: tuple[int, int]) -> Sentence:
    """What is compared of the tokens [start, stop), a whole sentence."""
    self._renew()
    if len(self._sentences) > _MOST_BLOCKS:
      self._sentences.clear()
    if span not in self._sentences:
      table, ids = self.table, self._tree.tokens(*span)
      read = table.read(ids)
      salience = table.salience[ids]
      total = salience @ table.vectors[ids].astype(np.float32)
      self._sentences[span] = Sentence(
        table.numbers(read, ids),
        np.array([salience[a:b].sum() for _, a, b in read], np.float32),
        total / (np.linalg.norm(total) + 1e-6), "".join(table.text(ids)),
        len(ids))
    return self._sentences[span]

  def _mark(self, run: np.ndarray, ids: np.ndarray, who: np.ndarray,
            special: np.ndarray) -> None:
    asks = np.array(["?" in piece for piece in self.table.text(ids)])
    shares = np.stack([who == turns.USER, who == turns.MODEL, special], 1)
    shares = shares.reshape(len(run), BRANCHING, 3).mean(axis=1)
    asked = np.asarray(asks.reshape(len(run), BRANCHING).any(axis=1))
    for block, share, ask in zip(run.tolist(), shares, asked.tolist()):
      self._marks[block] = np.array([*share, ask], np.float32)

  def _read(self, blocks: np.ndarray) -> list[np.ndarray]:
    """Word numbers of each block, in order; runs of blocks read as one."""
    if len(self._words) > _MOST_BLOCKS:
      self._words.clear()
    missing = [b for b in blocks.tolist() if b not in self._words]
    for at in runs_of(np.array(missing, np.int64)):
      self._read_run(missing[at[0]], missing[at[-1]] + 1)
    return [self._words[b] for b in blocks.tolist()]

  def _read_run(self, first: int, last: int) -> None:
    low = max(0, first * BRANCHING - MARGIN)
    high = min(self._tree.cursor, last * BRANCHING + MARGIN)
    ids = self._tree.tokens(low, high)
    words = self.table.read(ids)
    numbers = self.table.numbers(words, ids)
    block = (np.array([a for _, a, _ in words], np.int64) + low) // BRANCHING
    cuts = np.searchsorted(block, np.arange(first, last + 1))
    for b, x, y in zip(range(first, last), cuts[:-1], cuts[1:]):
      self._words[b] = numbers[x:y]


def _rows(blocks: np.ndarray, known: dict[int, np.ndarray], read: Callable
          ) -> np.ndarray:
  """Rows of blocks [n], those not `known` by `read(1, first, stop)`."""
  if len(known) > _MOST_BLOCKS:
    known.clear()
  missing = np.unique([b for b in blocks.tolist() if b not in known])
  for run in (missing[at] for at in runs_of(missing)):
    first = int(run[0])
    known.update(zip(run.tolist(), read(1, first, first + len(run))))
  return np.stack([known[b] for b in blocks.tolist()])


def runs_of(values: np.ndarray) -> list[np.ndarray]:
  """Positions of `values`, cut where they do not count up by one."""
  if not len(values):
    return []
  cuts = np.flatnonzero(np.diff(values) != 1) + 1
  return np.split(np.arange(len(values)), cuts)


def _forms(word: str) -> tuple[str, ...]:
  """Spellings of a case-folded word that text may use."""
  cases = dict.fromkeys((word, word.capitalize(), word.upper()))
  return tuple(blank + case for case in cases for blank in (" ", ""))
