"""Words of a history: number, spelling and meaning, and how rare they are."""

from __future__ import annotations

import bisect
import codecs
from collections.abc import Sequence
import re
import zlib

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING

SAMPLE = 32  # runs of 32 blocks at most in which words are counted
MARGIN = 8  # tokens beside a block that complete its first and last word
_TRIGRAM_BITS = 256  # hashed trigrams of a word
_WORD = re.compile(r"\w+")


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


class WordCounts:
  """Counts how many blocks of one tree hold words, in a sample of them.

  Up to 32k tokens that is every block, then every second run of 32 blocks,
  every fourth and so on: while a history grows its sample grows with it. What
  was read is kept, 16 runs more whenever a history doubles; a tree that was
  written anew needs new counts.
  """

  def __init__(self, tree: MegaContextTree, table: WordTable):
    self._tree, self._table = tree, table
    self._told: dict[int, list[frozenset[str]]] = {}

  def count(self, words: Sequence[str], last: int) -> tuple[list[int], int]:
    """Blocks that hold each case-folded word, and how many there are in all.

    Args:
      words: what to count.
      last: only blocks before this one.
    """
    runs = -(-last // BRANCHING)
    step = 1 << max(0, (runs - 1) // SAMPLE).bit_length()
    sample = [told for run in range(0, runs, step)
              for told in self._told_in(run, last)]
    return [sum(word in told for told in sample) for word in words], len(sample)

  def _told_in(self, run: int, last: int) -> list[frozenset[str]]:
    """The case-folded words of each block before `last` of a run of 32."""
    first = run * BRANCHING
    count = min(BRANCHING, last - first)
    if len(self._told.get(run, ())) < count:
      start = first * BRANCHING
      low, stop = max(0, start - MARGIN), start + count * BRANCHING
      ids = self._tree.tokens(low, min(self._tree.cursor, stop + MARGIN))
      pieces = self._table.texts(np.split(ids, np.arange(
        start, stop + 1, BRANCHING) - low))
      ends = np.cumsum(list(map(len, pieces))).tolist()
      told: list[set[str]] = [set() for _ in range(count)]
      for match in _WORD.finditer("".join(pieces)):
        at = bisect.bisect_right(ends, match.start()) - 1
        if 0 <= at < count:
          told[at].add(match.group().casefold())
      self._told[run] = [frozenset(words) for words in told]
    return self._told[run][:count]


def _decoded(pieces: Sequence[bytes]) -> list[str]:
  decode = codecs.getincrementaldecoder("utf-8")("replace").decode
  return [decode(piece) for piece in pieces]
