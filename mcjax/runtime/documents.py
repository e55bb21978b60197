"""Documents of a history: names and spans, and passages that answer a query.

A document is a span of tokens with a name, kept in the tree's journal. A
forgotten one keeps its tokens and gists in the tree, and nobody sees them.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
import time
from typing import Any

import numpy as np

from mcjax.answer.matching import Matcher, QueryWords
from mcjax.answer.reading import Reader
from mcjax.answer.words import WordTable
from mcjax.base.tokenizer import Tokenizer
from mcjax.lens.keyer import LensKeyer
from mcjax.tree.journal import FORGOTTEN
from mcjax.tree.search import by_keys, by_words
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, McjaxError

_DOCUMENT = "document"  # kind of event
_CANDIDATES = 8  # blocks looked at, for every passage wanted


@dataclasses.dataclass(frozen=True)
class Document:
  """One document of a history.

  Attributes:
    name: as given; several documents may share one.
    start, stop: its tokens.
    digest: SHA-256 of its content.
    metadata: as given.
    time: seconds since 1970 at which it came in.
  """

  name: str
  start: int
  stop: int
  digest: str
  metadata: dict[str, Any]
  time: float


@dataclasses.dataclass(frozen=True)
class Source:
  """A passage of the history.

  Attributes:
    document: name of the document that holds it; None in a conversation.
    start, stop: its tokens.
    text: what it says.
    score: how much of the query it holds by rare words or, where the learned
      keys tell, how much alike it is in meaning; in [0, 1].
  """

  document: str | None
  start: int
  stop: int
  text: str
  score: float


class Documents:
  """The documents of one tree, by place, name and content."""

  def __init__(self, tree: MegaContextTree):
    self._tree = tree
    self._read = -1
    self.all()

  def all(self) -> list[Document]:
    """Those that are not forgotten, in the order of their tokens."""
    events = self._tree.journal.events
    if self._read != len(events):  # a transient one may be gone again
      self._read = len(events)
      gone = {(e["start"], e["stop"]) for e in events
              if e["kind"] == FORGOTTEN}
      self._all = [
        Document(**{k: v for k, v in e.items() if k != "kind"}) for e in events
        if e["kind"] == _DOCUMENT and (e["start"], e["stop"]) not in gone]
      self._starts = [d.start for d in self._all]
      self._digests = {d.digest: d for d in self._all}
    return list(self._all)

  def holding(self, digest: str) -> Document | None:
    """The document of this content, if there is one."""
    self.all()
    return self._digests.get(digest)

  def at(self, token: int) -> Document | None:
    """The document that holds a token."""
    self.all()
    at = bisect.bisect_right(self._starts, token) - 1
    if at < 0 or token >= self._all[at].stop:
      return None
    return self._all[at]

  def add(self, name: str | None, start: int, stop: int, digest: str,
          metadata: dict[str, Any]) -> Document:
    """Notes that tokens [start, stop) are a document."""
    count = len(self._tree.journal.of(_DOCUMENT))
    self._tree.journal.add(
      _DOCUMENT, name=name or f"text {count + 1}", start=start, stop=stop,
      digest=digest, metadata=metadata, time=time.time())
    return self.all()[-1]

  def forget(self, name: str) -> list[Document]:
    """Hides all documents of a name.

    Raises:
      McjaxError: there is none.
    """
    found = [d for d in self.all() if d.name == name]
    if not found:
      raise McjaxError(f"no document is named {name!r}")
    for d in found:
      self._tree.journal.add(
        FORGOTTEN, start=d.start, stop=d.stop, time=time.time())
    return found


def digest_of(content: str | np.ndarray) -> str:
  """SHA-256 of a text, or of token ids."""
  if isinstance(content, str):
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
  return hashlib.sha256(np.asarray(content, "<i4").tobytes()).hexdigest()


def json_of(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
  """A copy of metadata as JSON has it. Raises: McjaxError where it has not."""
  try:
    return json.loads(json.dumps(dict(metadata or {})))
  except (TypeError, ValueError) as error:
    raise McjaxError(f"metadata are not JSON: {error}") from error


class Finder:
  """Finds what a tree says on a query, without the LM.

  By the words that a sentence shares with the query and, where the learned
  keys tell what is alike in meaning, by these.
  """

  def __init__(self, tree: MegaContextTree, tokenizer: Tokenizer,
               keyer: object | None, max_nodes: int):
    self._tree, self._max_nodes = tree, max_nodes
    self._keyer: LensKeyer | None = None
    vectors = np.zeros((tree.vocab_size, 1), np.float32)
    salience = vectors[:, 0]
    if isinstance(keyer, LensKeyer) and keyer.by_meaning:
      self._keyer, vectors, salience = keyer, keyer.vectors, keyer.salience
    self._matcher = Matcher(tree, WordTable(tokenizer, vectors, salience))
    self._reader = Reader(tree, tokenizer, self._matcher)

  def find(self, query_ids: np.ndarray, k: int
           ) -> list[tuple[tuple[int, int], float]]:
    """Up to k token spans (start, stop) and their scores, best first."""
    query = self._query(query_ids)
    spans = {
      span for block in self._blocks(query_ids, query, _CANDIDATES * k)
      for span in self._reader.sentences(block, self._tree.cursor)}
    scored = {span: self._reader.share(span, query) for span in spans}
    best: list[tuple[tuple[int, int], float]] = []
    for span, share in sorted(scored.items(), key=lambda s: (-s[1], s[0])):
      if share > 0 and len(best) < k:
        best.append((span, min(1.0, share)))
    return best

  def scores(self, query_ids: np.ndarray, spans: Sequence[tuple[int, int]]
             ) -> list[float]:
    """How well each span of tokens fits the query, in [0, 1]."""
    query = self._query(query_ids)
    return [min(1.0, self._reader.share(span, query)) for span in spans]

  def _query(self, query_ids: np.ndarray) -> QueryWords:
    return self._matcher.query(
      np.asarray(query_ids, np.int32), np.ones(len(query_ids), np.float32))

  def _blocks(self, query_ids: np.ndarray, query: QueryWords, count: int
              ) -> Iterable[int]:
    """Blocks that may answer, the unfinished one included."""
    tree, keyer = self._tree, self._keyer
    blocks: list[int] = []
    if np.any(query.token_weights > 0):
      search = by_words(
        tree, query.token_ids, query.token_weights, k=count)
      search.run(self._max_nodes)
      blocks += [b for b, _ in search.best(count)]
    if keyer is not None and tree.lens_fingerprint == keyer.fingerprint:
      key = keyer.query(query_ids, np.ones(len(query_ids), np.float32))
      search = by_keys(tree, key, k=count)
      search.run(self._max_nodes)
      blocks += [b for b, _ in search.best(count)]
    if tree.cursor % BRANCHING:
      blocks.append(tree.cursor // BRANCHING)
    return dict.fromkeys(blocks)
