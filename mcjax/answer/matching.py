"""How well blocks match a query: word by word, in spelling and in meaning.

A block ends where 32 tokens end, a word does not, and a token sequence changes
with case and with the blank before it. So blocks and query are compared as
case-folded words: which words of the query a block holds (weighted by rarity),
which words are spelled nearly alike (character trigrams), and which mean
nearly the same (the learned vectors of their tokens). Nothing here knows a
language.
"""

from __future__ import annotations

import bisect
import codecs
from collections.abc import Callable, Sequence
import re
from typing import NamedTuple
import zlib

import numpy as np

from mcjax.answer import turns
from mcjax.base.tokenizer import Tokenizer
from mcjax.tree import lexical_rank
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING

REACH = 2  # blocks on each side that a block is read with
_TRIGRAM_BITS = 256  # hashed trigrams of a word
MARKS = ("said_by_user", "said_by_model", "special", "question_mark")
_SAMPLE = 32  # runs of 32 blocks at most in which words are counted
_MARGIN = 8  # tokens beside a block that complete its first and last word
_MOST_BLOCKS = 1 << 14  # blocks whose words are kept
_MOST_WORDS = 1 << 17  # words that are kept
_WORD = re.compile(r"\w+")


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


class WordTable:
  """Words met so far, by number, with their trigrams and vectors.

  Attributes:
    tokenizer: of the base.
    vectors, salience: see `__init__`.
  """

  def __init__(self, tokenizer: Tokenizer, vectors: np.ndarray,
               salience: np.ndarray):
    """Makes an empty table.

    Args:
      tokenizer: of the base.
      vectors: [V, K] float32 or int8 of tokens.
      salience: [V] float32 how much each counts in a word.
    """
    self.tokenizer = tokenizer
    self.vectors, self.salience = vectors, salience
    self._pieces: dict[int, bytes] = {}
    self.clear()

  def clear(self) -> None:
    self._number: dict[str, int] = {}
    self._bits = np.zeros((256, _TRIGRAM_BITS), np.float32)
    self._meaning = np.zeros((256, self.vectors.shape[1]), np.float32)

  def __len__(self) -> int:
    return len(self._number)

  def read(self, ids: np.ndarray) -> list[tuple[str, int, int]]:
    """(case-folded word, first token, token behind) of token ids [T]."""
    pieces = self.text(ids)
    edges = np.cumsum([0, *map(len, pieces)])
    found = []
    for match in _WORD.finditer("".join(pieces)):
      a, b = np.searchsorted(edges, match.span(), side="right").tolist()
      found.append((match.group().casefold(), a - 1, max(a, b - 1)))
    return found

  def text(self, ids: np.ndarray) -> list[str]:
    """What each of token ids [T] adds to their text."""
    return _decoded(self._bytes(ids))

  def texts(self, parts: Sequence[np.ndarray]) -> list[str]:
    """What each part of a sequence of token ids adds to its text."""
    return _decoded([b"".join(self._bytes(ids)) for ids in parts])

  def _bytes(self, ids: np.ndarray) -> list[bytes]:
    known, listed = self._pieces, ids.tolist()
    for i in {*listed}.difference(known):
      known[i] = self.tokenizer.token_bytes(i)
    return [known[i] for i in listed]

  def numbers(self, words: Sequence[tuple[str, int, int]], ids: np.ndarray
              ) -> np.ndarray:
    """Numbers [n] int32 of words read from `ids`, new ones are added."""
    out = np.empty(len(words), np.int32)
    for i, (word, a, b) in enumerate(words):
      number = self._number.get(word)
      out[i] = self._add(word, ids[a:b]) if number is None else number
    return out

  def _add(self, word: str, ids: np.ndarray) -> int:
    number = len(self._number)
    if number == len(self._bits):
      self._bits = np.concatenate([self._bits, np.zeros_like(self._bits)])
      self._meaning = np.concatenate(
        [self._meaning, np.zeros_like(self._meaning)])
    self._number[word] = number
    framed = f"^{word}$"
    for i in range(len(framed) - 2):
      at = zlib.crc32(framed[i : i + 3].encode()) % _TRIGRAM_BITS
      self._bits[number, at] = 1.0
    vector = self.salience[ids] @ self.vectors[ids].astype(np.float32)
    self._meaning[number] = vector / np.sqrt(np.sum(vector**2) + 1e-6)
    return number

  def spelling(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard likeness [A, B] of the trigrams of words a [A] and b [B]."""
    x, y = self._bits[a], self._bits[b]
    both = x @ y.T
    return both / (x.sum(1)[:, None] + y.sum(1)[None] - both + 1e-6)

  def meaning(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines [A, B] of the vectors of words a [A] and b [B]."""
    return np.clip(self._meaning[a] @ self._meaning[b].T, 0.0, 1.0)


class Matcher:
  """Matches blocks of one tree with queries.

  Keeps what it has read for as long as the tree only grows.
  """

  def __init__(self, tree: MegaContextTree, table: WordTable):
    self._tree, self.table = tree, table
    self._clear()

  def _clear(self) -> None:
    self._words: dict[int, np.ndarray] = {}
    self._told: dict[int, list[frozenset[str]]] = {}
    self._marks: dict[int, np.ndarray] = {}
    self._keys: dict[int, np.ndarray] = {}
    self._gists: dict[int, np.ndarray] = {}
    self._sentences: dict[tuple[int, int], Sentence] = {}
    self._revision = self._tree.revision

  def _renew(self) -> None:
    """Drops what may have been taken back or written anew since."""
    if self._revision != self._tree.revision:
      self._clear()

  def query(self, token_ids: np.ndarray, prior: np.ndarray,
            stop: int | None = None) -> QueryWords:
    """The words of query tokens [T] with prior weights [T].

    They are as rare as the blocks before `stop` say, all of them by default: a
    prompt that is in the tree itself holds all of its words. Words are counted
    in a sample of these blocks, and what their tokens would say if they were
    independent counts as one block more.
    """
    if len(self.table) > _MOST_WORDS:
      self.table.clear()
      self._words.clear()
      self._sentences.clear()
    tokenizer = self.table.tokenizer
    words = self.table.read(token_ids)
    numbers = self.table.numbers(words, token_ids)
    blocks = max(1, self._tree.num_nodes(1) if stop is None else stop)
    seen, sampled = self._counted([word for word, _, _ in words], stop)
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
      held = blocks * (times + min(expected, 1.0)) / (sampled + 1)
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

  def _counted(self, words: Sequence[str], stop: int | None
               ) -> tuple[list[int], int]:
    """How many blocks of a sample hold each word, and how many it has.

    Up to 32k tokens that is every block, then every second run of 32 blocks,
    every fourth and so on: while a history grows its sample grows with it.
    """
    last = self.blocks if stop is None else min(stop, self.blocks)
    runs = -(-last // BRANCHING)
    step = 1 << max(0, (runs - 1) // _SAMPLE).bit_length()
    sample = [told for run in range(0, runs, step)
              for told in self._told_in(run, last)]
    return [sum(word in told for told in sample) for word in words], len(sample)

  def _told_in(self, run: int, last: int) -> list[frozenset[str]]:
    """The case-folded words of each block before `last` of a run of 32."""
    first = run * BRANCHING
    count = min(BRANCHING, last - first)
    if len(self._told.get(run, ())) < count:
      if len(self._told) * BRANCHING > _MOST_BLOCKS:
        self._told.clear()
      start = first * BRANCHING
      low, stop = max(0, start - _MARGIN), start + count * BRANCHING
      ids = self._tree.tokens(low, min(self._tree.cursor, stop + _MARGIN))
      pieces = self.table.texts(np.split(ids, np.arange(
        start, stop + 1, BRANCHING) - low))
      ends = np.cumsum(list(map(len, pieces))).tolist()
      told: list[set[str]] = [set() for _ in range(count)]
      for match in _WORD.finditer("".join(pieces)):
        at = bisect.bisect_right(ends, match.start()) - 1
        if 0 <= at < count:
          told[at].add(match.group().casefold())
      self._told[run] = [frozenset(words) for words in told]
    return self._told[run][:count]

  def blocks_around(self, blocks: np.ndarray, stop: int | None = None
                    ) -> np.ndarray:
    """Sorted blocks within `REACH` of `blocks`, those of the tree.

    Only those before `stop`, if it is given.
    """
    near = blocks[:, None] + np.arange(-REACH, REACH + 1)
    near = np.unique(near)
    known = self._tree.num_nodes(1)
    last = known if stop is None else min(stop, known)
    return near[(near >= 0) & (near < last)]

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
    low = max(0, first * BRANCHING - _MARGIN)
    high = min(self._tree.cursor, last * BRANCHING + _MARGIN)
    ids = self._tree.tokens(low, high)
    words = self.table.read(ids)
    numbers = self.table.numbers(words, ids)
    block = (np.array([a for _, a, _ in words], np.int64) + low) // BRANCHING
    cuts = np.searchsorted(block, np.arange(first, last + 1))
    for b, x, y in zip(range(first, last), cuts[:-1], cuts[1:]):
      self._words[b] = numbers[x:y]


def _decoded(pieces: Sequence[bytes]) -> list[str]:
  decode = codecs.getincrementaldecoder("utf-8")("replace").decode
  return [decode(piece) for piece in pieces]


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
