"""Retrievers over chunks of a history: by words, by meaning, and both.

BM25 (Robertson and Zaragoza 2009) as bm25s computes it; all-MiniLM-L6-v2 for
meaning; and their reciprocal rank fusion (Cormack et al. 2009).
"""

from __future__ import annotations

from collections.abc import Callable
import logging

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.evaluation.systems.rag import Embedder
from mcjax.evaluation.systems.system import Spans
from mcjax.types import McjaxError

KINDS = ("bm25", "dense", "fusion")
_FUSED = 60  # the constant of reciprocal rank fusion


class Retriever:
  """Ranks the chunks of one history; shared by the systems that search it.

  Args:
    tokenizer: of the base.
    chunk: tokens of one.
    embedder: makes the embedding model when it is first needed.
  """

  def __init__(self, tokenizer: Tokenizer, chunk: int = 64,
               embedder: Callable[[], Embedder] = Embedder):
    self.chunk = chunk
    self._tokenizer, self._make_embedder = tokenizer, embedder
    self._embedder: Embedder | None = None
    self._history = np.zeros(0, np.int32)
    self._clear()

  def _clear(self) -> None:
    self._texts: list[str] = []
    self._words = None
    self._vectors: np.ndarray | None = None

  def index(self, ids: np.ndarray) -> None:
    """Takes a history [n]; its indices are made when they are first asked."""
    if np.array_equal(ids, self._history):
      return
    self._clear()
    self._history = ids
    starts = range(0, len(ids), self.chunk)
    self._texts = [
      self._tokenizer.decode(ids[a : a + self.chunk].tolist()) for a in starts]

  def ranked(self, query: str, kind: str) -> Spans:
    """All chunks as token spans, best first.

    Args:
      query: a question.
      kind: one of KINDS.
    """
    if not self._texts:
      return ()
    if kind == "fusion":
      both = [self._scores(query, k) for k in ("bm25", "dense")]
      scores = sum(1 / (_FUSED + 1 + _ranks(s)) for s in both)
    else:
      scores = self._scores(query, kind)
    order = np.argsort(-scores, kind="stable")
    last = len(self._history)
    return tuple((int(i) * self.chunk, min(last, (int(i) + 1) * self.chunk))
                 for i in order)

  def _scores(self, query: str, kind: str) -> np.ndarray:
    return self._by_words(query) if kind == "bm25" else self._by_meaning(query)

  def _by_words(self, query: str) -> np.ndarray:
    bm25s = _bm25s()
    if self._words is None:
      self._words = bm25s.BM25()
      self._words.index(bm25s.tokenize(self._texts, show_progress=False),
                        show_progress=False)
    words = bm25s.tokenize([query], return_ids=False, show_progress=False)[0]
    known = [w for w in words if w in self._words.vocab_dict]
    if not known:
      return np.zeros(len(self._texts))
    return self._words.get_scores(known)

  def _by_meaning(self, query: str) -> np.ndarray:
    if self._embedder is None:
      self._embedder = self._make_embedder()
    if self._vectors is None:
      self._vectors = self._embedder.encode(self._texts)
    return self._vectors @ self._embedder.encode([query])[0]


def _ranks(scores: np.ndarray) -> np.ndarray:
  """Rank of each, 0 for the best."""
  out = np.empty(len(scores))
  out[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
  return out


def _bm25s():
  try:
    import bm25s
  except ImportError as error:
    raise McjaxError("BM25 needs pip install 'mcjax[eval]'") from error
  logging.getLogger("bm25s").setLevel(logging.WARNING)
  return bm25s
