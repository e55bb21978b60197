"""The public object: an unbounded history behind a frozen language model.

`MegaContext` turns text, prompts and places into what `FocusLoop` works on:
token ids, a tree, a window of fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import queue
import threading
import time
from typing import Any

import numpy as np

from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.gist.encoder import GistEncoder, load_gistnet
from mcjax.lens.policy import LensNetPolicy
from mcjax.runtime import answering, policy_choice
from mcjax.runtime.answering import Prompt, Request, Stopped
from mcjax.runtime.documents import (
  Document,
  Documents,
  Finder,
  Source,
  digest_of,
  json_of,
)
from mcjax.runtime.focus_loop import FocusLoop, Query, run_alone
from mcjax.runtime.policy_choice import Choice
from mcjax.runtime.results import Generation, IngestStats
from mcjax.runtime.telemetry import Telemetry
from mcjax.runtime.text_files import read_documents
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, Entry, McjaxError
from mcjax.window.context_lm import ContextLM
from mcjax.window.decoding import Decoder
from mcjax.window.sampling import Sampling

_QUESTION = 128  # newest words of a prompt that act as the query
_SLICE = 1 << 16  # tokens per tree append during a long ingest
_SEARCH_NODES = 4096  # tree nodes that `search` may touch, by words and by keys


def _locked(method):
  """Lets a method of a handle wait until no other thread works with it."""

  @functools.wraps(method)
  def waits(self, *args, **kwargs):
    with self._lock:
      return method(self, *args, **kwargs)

  return waits


class _LeftError(Exception):
  """The consumer of a stream has left."""


class MegaContext:
  """A frozen LM with an unbounded history; use `create` or `open`.

  Handles are safe to share between threads: a busy one lets others wait.

  Attributes:
    lm: the frozen base.
    config: of the loop.
    policy: name of the policy at work, also where the configuration says auto.
    tree: the history.
    telemetry: counters, seconds per phase and the newest records.
  """

  def __init__(self, tree: MegaContextTree, lm: BaseLM, config: Config,
               encoder: GistEncoder, telemetry: Telemetry, choice: Choice):
    self.lm = lm
    self.config = config
    self.policy = choice.name
    self.tree = tree
    self.telemetry = telemetry
    self._loop = FocusLoop(
      tree, ContextLM.reading(lm, config, encoder), choice.policy, encoder,
      config, self.telemetry,
    )
    self._loop.restore_focus(tree.extra.get("focus"))
    self._documents = Documents(tree)
    self._finder = Finder(
      tree, lm.tokenizer, choice.keyer, _SEARCH_NODES)
    self._closed = False
    self._lock = threading.RLock()  # a busy handle waits
    self._run = run_alone  # or by an engine, with other histories
    self._on_close: Callable[[], None] | None = None

  # --- opening and closing ------------------------------------------------

  @classmethod
  def create(cls, url: str, lm: BaseLM, config: Config | None = None,
             gistnet: GistEncoder | None = None,
             lensnet: LensNetPolicy | None = None) -> MegaContext:
    """Starts an empty history at `url`.

    Args:
      url: path, file://, memory://, gs:// or s3://.
      lm: the frozen base.
      config: of the loop; defaults.
      gistnet: the compressor; the shipped one by default.
      lensnet: for policy lensnet or auto; the shipped one by default.

    Raises:
      McjaxError: a tree is there already, or the place cannot be written.
    """
    config = config or Config()
    encoder = gistnet or load_gistnet(lm)
    _check_window(lm, config)
    choice = policy_choice.choose(config, lm, encoder, lensnet)
    telemetry = Telemetry(config.telemetry_path)
    try:
      tree = MegaContextTree.create(
        url, base_fingerprint=lm.fingerprint, base_name=lm.name,
        encoder=encoder, vocab_size=lm.config.vocab_size,
        extra={"config": dataclasses.asdict(config)}, keyer=choice.keyer,
      )
    except BaseException:
      telemetry.close()
      raise
    return cls(tree, lm, config, encoder, telemetry, choice)

  @classmethod
  def open(cls, url: str, lm: BaseLM, config: Config | None = None,
           gistnet: GistEncoder | None = None,
           lensnet: LensNetPolicy | None = None, *,
           mode: str = "a") -> MegaContext:
    """Resumes a history with the focus and configuration it was closed with.

    Args:
      url: as for `create`.
      lm: the frozen base.
      config: of the loop; the one it was closed with by default.
      gistnet: the compressor; the shipped one by default.
      lensnet: for policy lensnet or auto; the shipped one by default.
      mode: "a" holds the history exclusively until `close`; "r" only answers
        (`generate(remember=False)`, `score`), beside a writer and where
        nothing can be written, and goes on to newer commits by `refresh`.

    Raises:
      McjaxError: no tree is there, another base LM or GistNet wrote it, or it
        is open for writing elsewhere.
    """
    encoder = gistnet or load_gistnet(lm)
    tree = MegaContextTree.open(
      url, base_fingerprint=lm.fingerprint, base_name=lm.name, encoder=encoder,
      mode=mode,
    )
    try:
      return cls._resume(tree, lm, config, encoder, lensnet)
    except BaseException:
      tree.close()
      raise

  @classmethod
  def _resume(cls, tree: MegaContextTree, lm: BaseLM, config: Config | None,
              encoder: GistEncoder, lensnet: LensNetPolicy | None
              ) -> MegaContext:
    if config is None:
      known = {f.name for f in dataclasses.fields(Config)}
      saved = tree.extra.get("config", {})
      config = Config(**{k: v for k, v in saved.items() if k in known})
    _check_window(lm, config)
    choice = policy_choice.choose(config, lm, encoder, lensnet)
    choice = policy_choice.for_tree(choice, config, tree)
    telemetry = Telemetry(config.telemetry_path)
    return cls(tree, lm, config, encoder, telemetry, choice)

  def close(self) -> None:
    """Commits and releases the tree; the object is of no use afterwards.

    Raises:
      McjaxError: the commit failed; the tree is released all the same.
    """
    with self._lock:
      if self._closed:
        return
      self._closed = True
      try:
        if not self.tree.read_only:
          self._commit()
      finally:
        self.tree.close()
        self.telemetry.close()
        if self._on_close is not None:
          self._on_close()

  @_locked
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

  def __enter__(self) -> MegaContext:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _commit(self) -> None:
    self.tree.commit({
      "config": dataclasses.asdict(self.config),
      "focus": self._loop.saved_focus(),
    })

  # --- public work --------------------------------------------------------

  @_locked
  def ingest(self, text: str,
             progress: Callable[[int, int], None] | None = None, *,
             name: str | None = None,
             metadata: Mapping[str, Any] | None = None) -> IngestStats:
    """Adds a document to the history; the same content again is skipped.

    Args:
      text: any length.
      progress: called with tokens done and tokens in all.
      name: of the document, which then begins on a line of its own; numbered
        by default.
      metadata: small JSON that is kept with it.

    Raises:
      McjaxError: the text is empty or not a string, or metadata are no JSON.
    """
    self._check_text(text, "text")
    begin, facts = time.perf_counter(), json_of(metadata)
    digest = digest_of(text)
    known = self._documents.holding(digest)
    if known is not None:
      return IngestStats(0, time.perf_counter() - begin, self.tree.cursor,
                         known.name, skipped=True)
    ids = self.lm.tokenizer.encode(text)
    before = self._line_break() if name else ids[:0]
    cursor = self.tree.cursor
    with self._all_or_nothing(cache=False):
      self._add(np.concatenate([before, ids]), progress)
      document = self._documents.add(
        name, self.tree.cursor - len(ids), self.tree.cursor, digest, facts)
      self._commit()
    return self._added(cursor, begin, document.name)

  def ingest_files(
    self, paths: Sequence[str], suffixes: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
  ) -> list[IngestStats]:
    """Adds files, folders and "-" (standard input) as documents.

    Empty files are passed over; see `read_documents`.

    Args:
      paths: each file's path is its document's name.
      suffixes: in folders only files that end so; all by default.
      progress: as for `ingest`, within each file.

    Raises:
      McjaxError: a path cannot be read; files before it are ingested.
    """
    return [self.ingest(file.text, progress, name=file.name)
            for file in read_documents(paths, suffixes) if file.text]

  @_locked
  def ingest_tokens(
    self, token_ids: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
  ) -> IngestStats:
    """Adds token ids [n] int32 of this base's tokenizer, as no document.

    Raises:
      McjaxError: no tokens, or ids outside the vocabulary.
    """
    self._check_open()
    if not len(token_ids):
      raise McjaxError("no tokens to ingest: nothing was changed")
    begin, cursor = time.perf_counter(), self.tree.cursor
    with self._all_or_nothing(cache=False):
      self._add(token_ids, progress)
      self._commit()
    return self._added(cursor, begin)

  def _add(self, token_ids: np.ndarray, progress) -> None:
    """Adds tokens, not committed yet."""
    ids = self._with_bos(np.asarray(token_ids, np.int32))
    start = self.tree.cursor
    for a in range(0, len(ids), _SLICE):
      self._loop.remember(ids[a : a + _SLICE])
      if progress is not None:
        progress(self.tree.cursor - start, len(ids))
    self._loop.show(self.tree.cursor - start)
    self._loop.follow()
    self._loop.check()

  def _added(self, before: int, begin: float, document: str | None = None
             ) -> IngestStats:
    """Tells what joined a history of `before` tokens."""
    seconds = time.perf_counter() - begin
    tokens = self.tree.cursor - before
    self.telemetry.record(
      "ingest", tokens=tokens, seconds=seconds, cursor=self.tree.cursor
    )
    return IngestStats(tokens, seconds, self.tree.cursor, document)

  @_locked
  def documents(self) -> list[Document]:
    """The documents that are not forgotten, in the order they came in."""
    self._check_open()
    return self._documents.all()

  @_locked
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

  @_locked
  def forget(self, name: str) -> list[Document]:
    """Hides a document from focus, search and answers, at once and for good.

    Its tokens and gists stay in the tree until that is compacted.

    Returns:
      What was forgotten: all documents of this name.

    Raises:
      McjaxError: no document has this name.
    """
    self._check_open()
    with self._all_or_nothing(cache=False):
      gone = self._documents.forget(name)
      self._loop.forget()
      self._commit()
    return gone

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

  def generate(self, prompt: Prompt, max_new_tokens: int = 64, *,
               temperature: float | None = None, top_p: float = 1.0,
               top_k: int = 0, min_p: float = 0.0,
               repetition_penalty: float = 1.0,
               stop: str | Sequence[str] = (), seed: int | None = None,
               logprobs: bool = False, remember: bool = True,
               template: bool = True,
               on_text: Callable[[str], None] | None = None,
               on_piece: Callable[[str], None] | None = None) -> Generation:
    """Answers a prompt; prompt and answer join the history.

    Args:
      prompt: a text, or messages {"role": "system" | "user" | "assistant",
        "content": text} of which the last one is answered; wrapped in the
        base's chat template where it has one. One that is longer than the
        window is ingested like any text.
      max_new_tokens: at most this many; 0 settles the focus only.
      temperature: 0 is greedy; that of the configuration by default.
      top_p, top_k, min_p, repetition_penalty: see `Sampling`.
      stop: strings that end the answer and are left out of it.
      seed: the same one draws the same tokens; each answer differs without.
      logprobs: whether the tokens' log probabilities are wanted.
      remember: False leaves tree, focus and cache as they were.
      template: False takes the prompt as it stands.
      on_text: called with the whole answer so far after every block. If it
        raises, or the answer fails or is interrupted, all is as before.
      on_piece: called with each new piece of text, see `stream`. What it
        raises ends the answer; the turn is closed, and it is raised again.

    Raises:
      McjaxError: empty prompt, a setting out of range, or the oracle policy,
        which needs to know what comes next.
    """
    if temperature is None:
      temperature = self.config.temperature
    request = Request(
      max_new_tokens,
      Sampling(repetition_penalty, temperature, top_k, top_p, min_p),
      (stop,) if isinstance(stop, str) else tuple(stop), seed, logprobs,
      on_piece, on_text)
    with self._lock:
      self._check_prompt(prompt)
      self._loop.warm_up()
      if not remember:
        try:
          with self._loop.undone():
            return self._answered(prompt, request, template)
        except Stopped as stopped:
          raise stopped.cause from None
      out, stopped_by = None, None
      with self._all_or_nothing(cache=True):
        try:
          out = self._answered(prompt, request, template)
        except Stopped as stopped:  # by the consumer: the turn is closed
          stopped_by = stopped.cause
        self._commit()
      if stopped_by is not None:
        raise stopped_by
      assert out is not None
      return out

  def stream(self, prompt: Prompt, max_new_tokens: int = 64, **settings
             ) -> Iterator[str]:
    """Yields pieces of the answer as they come, never half a character.

    A consumer that stops early ends the answer; its turn is closed.

    Args:
      prompt, max_new_tokens, settings: as of `generate`.

    Raises:
      McjaxError: as `generate`.
    """
    pieces: queue.Queue = queue.Queue()
    left = threading.Event()

    def on_piece(piece: str) -> None:
      pieces.put(piece)
      if left.is_set():
        raise _LeftError

    def work() -> None:
      try:
        self.generate(prompt, max_new_tokens, on_piece=on_piece, **settings)
        pieces.put(None)
      except BaseException as error:
        pieces.put(error)

    worker = threading.Thread(target=work, name="mcjax-stream", daemon=True)
    worker.start()
    try:
      while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
          raise piece
        yield piece
    finally:
      left.set()
      worker.join()

  def _generate(self, prompt: Prompt, max_new_tokens: int,
                on_text: Callable[[str], None] | None = None) -> Generation:
    """An answer that joins the history in memory alone."""
    sampling = Sampling(temperature=self.config.temperature)
    return self._answered(
      prompt, Request(max_new_tokens, sampling, on_text=on_text), True)

  def _answered(self, prompt: Prompt, request: Request, template: bool
                ) -> Generation:
    ids, closing = self._prompt(prompt, template)
    return self._run(answering.steps(
      self._loop, ids, closing, request, self._sources), self._loop.context)

  @_locked
  def score(self, text: str) -> np.ndarray:
    """NLL per token of `text` in nats, teacher-forced through the loop.

    The text is not remembered: tree, focus and cache are as before. The very
    first token of an empty history has no prediction and is NaN.

    Raises:
      McjaxError: the text is empty or not a string.
    """
    self._check_text(text, "text")
    self._loop.warm_up()
    return self._loop.score(self.lm.tokenizer.encode(text))

  @_locked
  def focus(self) -> list[Entry]:
    """The entries (level, start, stop) that tile [0, cursor)."""
    return self._loop.context.window.focus()

  @_locked
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

  @_locked
  def next_logits(self) -> np.ndarray:
    """Logits [V] float32 for the token after the history as focused now.

    Raises:
      McjaxError: the history is empty.
    """
    self._check_open()
    if not self.tree.cursor:
      raise McjaxError("the history is empty: nothing to predict from")
    self._loop.warm_up()
    self._loop.sync()
    return self._loop.context.logits()

  @property
  def cursor(self) -> int:
    """Tokens in the history."""
    return self.tree.cursor

  # --- small parts --------------------------------------------------------

  def _prompt(self, prompt: Prompt, template: bool = True
              ) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the prompt, and those that close the answer."""
    tokenizer = self.lm.tokenizer
    messages: Sequence[Mapping[str, str]] = (
      [{"role": "user", "content": prompt}] if isinstance(prompt, str)
      else prompt)
    if template and self.config.chat == "auto" and tokenizer.has_chat_template:
      chat = tokenizer.chat(messages, first=not self.tree.cursor)
      ids, own = chat.ids, chat.owner == len(messages) - 1
      closing = np.asarray(tokenizer.end_of_turn_ids, np.int32)
      line = self._line_break()
      ids = np.concatenate([line, ids])
      own = np.concatenate([np.zeros(len(line), bool), own])
    else:
      text = "\n\n".join(m["content"] for m in messages)
      ids = self._with_bos(tokenizer.encode(text))
      own, closing = np.ones(len(ids), bool), np.zeros(0, np.int32)
    words, start = ids[own], self.tree.cursor
    # A line break before the prompt is read with it.
    begin = start - self._ends_a_line()
    head = start - begin + int(np.argmax(own))
    if len(words) > _QUESTION:  # a pasted text with the question at its end
      words = words[-_QUESTION:]
      start += int(np.flatnonzero(own)[-_QUESTION])
    self._loop.query = Query(
      words, np.ones(len(words), np.float32), start, asked=True,
      prompt=begin, head=head,
    )
    return ids, closing

  def _ends_a_line(self) -> bool:
    """Whether the history ends with a line break."""
    last = self.tree.tokens(max(0, self.tree.cursor - 1), self.tree.cursor)
    return self.lm.tokenizer.decode(last).endswith("\n")

  def _line_break(self) -> np.ndarray:
    """Ids between text of the history and a turn, which begins on a new line.

    None where one begins already, and behind another turn.
    """
    tokenizer, cursor = self.lm.tokenizer, self.tree.cursor
    last = self.tree.tokens(max(0, cursor - 1), cursor).tolist()
    if not last or last[0] in tokenizer.special_ids or self._ends_a_line():
      return np.zeros(0, np.int32)
    return np.asarray(tokenizer.encode("\n"), np.int32)

  def _with_bos(self, ids: np.ndarray) -> np.ndarray:
    bos = self.lm.tokenizer.bos_id
    if self.tree.cursor or bos is None:
      return ids
    return np.concatenate([np.array([bos], np.int32), ids])

  def _check_open(self) -> None:
    if self._closed:
      raise McjaxError("this MegaContext is closed; open it again")

  @contextlib.contextmanager
  def _all_or_nothing(self, cache: bool) -> Iterator[None]:
    """A change that ends with a commit, or leaves all as before it."""
    if self.tree.read_only:
      raise McjaxError(
        f'{self.tree.url} was opened with mode="r": it answers with'
        " remember=False and takes nothing in"
      )
    try:
      with self._loop.all_or_nothing(cache):
        yield
    except BaseException:
      self._documents = Documents(self.tree)
      raise

  def _check_prompt(self, prompt: Prompt) -> None:
    self._check_open()
    if self.config.policy == "oracle":
      raise McjaxError(
        "policy oracle needs the true continuation: it works in score only")
    if isinstance(prompt, str):
      self._check_text(prompt, "prompt")
      return
    if not isinstance(prompt, Sequence) or not prompt:
      raise McjaxError(
        f"prompt must be a string or messages, got {type(prompt).__name__}")
    for message in prompt:
      if not isinstance(message, Mapping) or not {"role", "content"} <= set(
          message):
        raise McjaxError(
          f"a message must have a role and a content, got {message!r}")
      self._check_text(message["content"], "a message's content")

  def _check_text(self, text: str, name: str) -> None:
    self._check_open()
    if not isinstance(text, str):
      raise McjaxError(f"{name} must be a string, got {type(text).__name__}")
    if not text:
      raise McjaxError(f"{name} is empty: nothing was changed")


def _check_window(lm: BaseLM, config: Config) -> None:
  if config.window + BRANCHING > lm.config.max_positions:
    raise McjaxError(
      f"config.window {config.window} does not fit the {lm.name} base's "
      f"{lm.config.max_positions} positions (32 are kept for the next block)"
    )
