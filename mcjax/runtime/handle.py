"""What every open history has: a lock, a tree, a window, a way to close."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import threading
from typing import Any, Self

import numpy as np

from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.gist.encoder import GistEncoder
from mcjax.pretrained import cards
from mcjax.runtime.documents import Document, Documents, Finder, Source
from mcjax.runtime.focus_loop import FocusLoop, run_alone
from mcjax.runtime.policy_choice import Choice
from mcjax.runtime.prompts import checked_text
from mcjax.runtime.telemetry import Telemetry
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, Entry, McjaxError
from mcjax.window.context_lm import ContextLM
from mcjax.window.decoding import Decoder

_SEARCH_NODES = 4096  # tree nodes that `search` may touch, by words and by keys


def locked(method):
  """Lets a method of a handle wait until no other thread works with it."""

  @functools.wraps(method)
  def waits(self, *args, **kwargs):
    with self._lock:
      return method(self, *args, **kwargs)

  return waits


def check_window(lm: BaseLM, config: Config) -> None:
  """Raises: McjaxError, the base has too few positions for the window."""
  if config.window + BRANCHING > lm.config.max_positions:
    raise McjaxError(
      f"config.window {config.window} does not fit the {lm.name} base's "
      f"{lm.config.max_positions} positions (32 are kept for the next block)"
    )


class Handle:
  """One open history; `MegaContext` adds what is done with it."""

  def __init__(self, tree: MegaContextTree, lm: BaseLM, config: Config,
               encoder: GistEncoder, telemetry: Telemetry, choice: Choice):
    self.lm = lm
    self.config = config
    self.policy = choice.name
    self.tree = tree
    self.telemetry = telemetry
    settled = cards.settled(config, lm.name)
    self._loop = FocusLoop(
      tree, ContextLM.reading(lm, settled, encoder), choice.policy, encoder,
      settled, self.telemetry,
    )
    self._loop.restore_focus(tree.extra.get("focus"))
    self._documents = Documents(tree)
    self._finder = Finder(
      tree, lm.tokenizer, choice.keyer, _SEARCH_NODES)
    self.system: str = tree.extra.get("system", "")
    self._closed = False
    self._lock = threading.RLock()  # a busy handle waits
    self._run = run_alone  # or by an engine, with other histories
    self._on_close: Callable[[], None] | None = None

  def close(self) -> None:
    """Commits and releases the tree; the object is of no use afterwards.

    Raises:
      McjaxError: the commit failed; the tree is released all the same.
    """
    with self._lock:
      if self._closed:
        return
      self._closed = True
      self._loop.stop_compiling()
      try:
        if not self.tree.read_only:
          self._commit()
      finally:
        self.tree.close()
        self.telemetry.close()
        if self._on_close is not None:
          self._on_close()

  @locked
  def refresh(self) -> bool:
    """Goes on to the newest commit; of a history opened with mode "r".

    Returns:
      Whether there was a newer one.

    Raises:
      McjaxError: opened for writing; or the tree is gone, damaged, or of
        another GistNet now.
    """
    self._check_open()
    if not self.tree.refresh():
      return False
    self._loop.restore_focus(self.tree.extra.get("focus"))
    self._documents = Documents(self.tree)
    self._loop.context.forget()
    self._loop.follow()
    return True

  @property
  def context(self) -> ContextLM:
    """The LM's window."""
    return self._loop.context

  def join(self, decoder: Decoder, row: int, run: Callable[..., Any],
           on_close: Callable[[], None]) -> None:
    """Lets an engine decode this history as one row of a decoder.

    Args:
      decoder: of windows like this one.
      row: in it.
      run: see `run_alone`.
      on_close: called when the history is closed.
    """
    with self._lock:
      self._loop.context.join(decoder, row)
      self._run, self._on_close = run, on_close

  def __repr__(self) -> str:
    state = "closed" if self._closed else f"{self.tree.cursor:,} tokens"
    return (f"MegaContext({self.tree.url!r}, {self.lm.name}, {state}, policy "
            f"{self.policy}, window {self.config.window})")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  @property
  def cursor(self) -> int:
    """Tokens in the history."""
    return self.tree.cursor

  @locked
  def focus(self) -> list[Entry]:
    """The entries (level, start, stop) that tile [0, cursor)."""
    return self._loop.context.window.focus()

  @locked
  def text(self, start: int, stop: int) -> str:
    """The text of tokens [start, stop) of the history.

    Raises:
      McjaxError: the history holds no such tokens.
    """
    self._check_open()
    if not 0 <= start <= stop <= self.tree.cursor:
      raise McjaxError(f"tokens [{start}, {stop}) are not in the history of "
                       f"{self.tree.cursor}")
    return self.lm.tokenizer.decode(self.tree.tokens(start, stop))

  @locked
  def next_logits(self) -> np.ndarray:
    """Logits [V] float32 for the token after the history as focused now.

    Raises:
      McjaxError: the history is empty.
    """
    self._check_open()
    if not self.tree.cursor:
      raise McjaxError("the history is empty: nothing to predict from")
    with self._loop.warm_up_beside():
      self._loop.sync()
      return self._loop.context.logits()

  @locked
  def documents(self) -> list[Document]:
    """The documents that are not forgotten, in the order they came in."""
    self._check_open()
    return self._documents.all()

  @locked
  def search(self, query: str, k: int = 5) -> list[Source]:
    """Up to k passages that fit a query, best first, without generating.

    Raises:
      McjaxError: the query is empty or not a string, or k < 1.
    """
    self._check_text(query, "query")
    if not isinstance(k, int) or k < 1:
      raise McjaxError(f"k must be a whole number >= 1, got {k}")
    ids = self.lm.tokenizer.encode(query)
    return [self._source(span, score)
            for span, score in self._finder.find(ids, k)]

  def _source(self, span: tuple[int, int], score: float) -> Source:
    document, (start, stop) = self._documents.at(span[0]), span
    if document is None:
      return Source(None, start, stop, self.text(start, stop), score)
    stop = min(stop, document.stop)
    return Source(document.name, start, stop, self.text(start, stop), score)

  def _sources(self) -> list[Source]:
    """What answers the loop's question, best first."""
    spans = self._loop.sources or self._loop.found
    scores = self._finder.scores(self._loop.query.ids, spans)
    return sorted(map(self._source, spans, scores), key=lambda s: -s.score)

  def _commit(self) -> None:
    self._loop.rest()
    self.tree.commit({
      "config": dataclasses.asdict(self.config),
      "focus": self._loop.saved_focus(),
      "system": self.system,
    })

  def _check_open(self) -> None:
    if self._closed:
      raise McjaxError("this MegaContext is closed; open it again")

  def _check_text(self, text: str, name: str) -> None:
    self._check_open()
    checked_text(text, name)

  @contextlib.contextmanager
  def _all_or_nothing(self) -> Iterator[None]:
    """A change that ends with a commit, or leaves all as before it."""
    if self.tree.read_only:
      raise McjaxError(
        f'{self.tree.url} was opened with mode="r": it answers with'
        " remember=False and takes nothing in"
      )
    try:
      with self._loop.all_or_nothing():
        yield
    except BaseException:
      self._documents = Documents(self.tree)
      raise
