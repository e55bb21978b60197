"""The public object: an unbounded history behind a frozen language model.

`MegaContext` turns text, prompts and places into what `FocusLoop` works on:
token ids, a tree, a window of fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import time
from typing import Any

import numpy as np

from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.gist.encoder import GistEncoder, load_gistnet
from mcjax.lens.policy import LensNetPolicy
from mcjax.pretrained import cards
from mcjax.runtime import answering, policy_choice, prompts
from mcjax.runtime.answering import Request, Stopped
from mcjax.runtime.documents import Document, digest_of, json_of
from mcjax.runtime.handle import Handle, check_window, locked
from mcjax.runtime.prompts import Prompt
from mcjax.runtime.results import Generation, IngestStats
from mcjax.runtime.streaming import pieces_of
from mcjax.runtime.telemetry import Telemetry
from mcjax.runtime.text_files import read_documents
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError
from mcjax.window.sampling import Sampling

_SLICE = 1 << 16  # tokens per tree append during a long ingest


class MegaContext(Handle):
  """A frozen LM with an unbounded history; use `create` or `open`.

  Handles are safe to share between threads: a busy one lets others wait.

  Attributes:
    lm: the frozen base.
    config: of the loop, as it was given; what it leaves to the base's card
      stays open, so that a history follows the card of the day.
    policy: name of the policy at work, also where the configuration says auto.
    tree: the history.
    system: what the model is told before every prompt; "" is nothing.
    telemetry: counters, seconds per phase and the newest records.
  """

  # --- opening and closing ------------------------------------------------

  @classmethod
  def create(cls, url: str, lm: BaseLM, config: Config | None = None,
             gistnet: GistEncoder | None = None,
             lensnet: LensNetPolicy | None = None, *,
             system: str = "") -> MegaContext:
    """Starts an empty history at `url`.

    Args:
      url: path, file://, memory://, gs:// or s3://.
      lm: the frozen base.
      config: of the loop; defaults.
      gistnet: the compressor; the shipped one by default.
      lensnet: for policy lensnet or auto; the shipped one by default.
      system: what the model is told before every prompt, kept with the
        history; it stands in the history once a turn.

    Raises:
      McjaxError: a tree is there already, or the place cannot be written.
    """
    config = config or Config()
    encoder = gistnet or load_gistnet(lm)
    check_window(lm, config)
    choice = policy_choice.choose(config, lm, encoder, lensnet)
    telemetry = Telemetry(config.telemetry_path)
    try:
      tree = MegaContextTree.create(
        url, base_fingerprint=lm.fingerprint, base_name=lm.name,
        encoder=encoder, vocab_size=lm.config.vocab_size,
        extra={"config": dataclasses.asdict(config),
               "system": prompts.checked_system(system)}, keyer=choice.keyer,
      )
    except BaseException:
      telemetry.close()
      raise
    return cls(tree, lm, config, encoder, telemetry, choice)

  @classmethod
  def open(cls, url: str, lm: BaseLM, config: Config | None = None,
           gistnet: GistEncoder | None = None,
           lensnet: LensNetPolicy | None = None, *,
           mode: str = "a", system: str | None = None) -> MegaContext:
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
      system: as for `create`; the one that is kept by default.

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
      mc = cls._resume(tree, lm, config, encoder, lensnet)
      if system is not None:
        mc.system = prompts.checked_system(system)
      return mc
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
    check_window(lm, config)
    choice = policy_choice.choose(config, lm, encoder, lensnet)
    choice = policy_choice.for_tree(
      choice, cards.settled(config, lm.name), tree)
    telemetry = Telemetry(config.telemetry_path)
    return cls(tree, lm, config, encoder, telemetry, choice)

  # --- public work --------------------------------------------------------

  @locked
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
    before = ids[:0]
    if name:
      before = prompts.line_break(self.tree, self.lm.tokenizer)
    cursor = self.tree.cursor
    with self._all_or_nothing():
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

  @locked
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
    with self._all_or_nothing():
      self._add(token_ids, progress)
      self._commit()
    return self._added(cursor, begin)

  def _add(self, token_ids: np.ndarray, progress) -> None:
    """Adds tokens, not committed yet."""
    ids = prompts.with_bos(
      np.asarray(token_ids, np.int32), self.tree, self.lm.tokenizer)
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

  @locked
  def forget(self, name: str) -> list[Document]:
    """Hides a document from focus, search and answers, at once and for good.

    Its tokens and gists stay in the tree until that is compacted.

    Returns:
      What was forgotten: all documents of this name.

    Raises:
      McjaxError: no document has this name.
    """
    self._check_open()
    with self._all_or_nothing():
      gone = self._documents.forget(name)
      self._loop.forget()
      self._commit()
    return gone

  def generate(self, prompt: Prompt, max_new_tokens: int = 64, *,
               temperature: float | None = None, top_p: float = 1.0,
               top_k: int = 0, min_p: float = 0.0,
               repetition_penalty: float = 1.0,
               stop: str | Sequence[str] = (), seed: int | None = None,
               logprobs: bool = False, top_logprobs: int = 0,
               remember: bool = True, system: str | None = None,
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
      top_logprobs: list so many of the likeliest tokens beside each, <= 20.
      system: what the model is told before this prompt, instead of what the
        history was opened with; "" is nothing. A message with the role system
        goes before both.
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
      top_logprobs, on_piece, on_text)
    with self._lock:
      self._check_prompt(prompt)
      with self._loop.warm_up_beside():
        answer = self._remembered if remember else self._forgotten
        return answer(prompt, request, template, system)

  def _forgotten(self, *asked) -> Generation:
    """An answer after which all is as before."""
    try:
      with self._loop.undone():
        return self._answered(*asked)
    except Stopped as stopped:
      raise stopped.cause from None

  def _remembered(self, *asked) -> Generation:
    """An answer that is committed with its prompt."""
    out, stopped_by = None, None
    with self._all_or_nothing():
      try:
        out = self._answered(*asked)
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
    return pieces_of(functools.partial(
      self._streamed, prompt, max_new_tokens, settings))

  def _streamed(self, prompt: Prompt, max_new_tokens: int, settings: dict,
                on_piece: Callable[[str], None]) -> Generation:
    return self.generate(prompt, max_new_tokens, on_piece=on_piece, **settings)

  def _generate(self, prompt: Prompt, max_new_tokens: int,
                on_text: Callable[[str], None] | None = None) -> Generation:
    """An answer that joins the history in memory alone."""
    sampling = Sampling(temperature=self.config.temperature)
    return self._answered(
      prompt, Request(max_new_tokens, sampling, on_text=on_text), True)

  def _answered(self, prompt: Prompt, request: Request, template: bool,
                system: str | None = None) -> Generation:
    turn = self._turn(prompt, template, system)
    return self._run(answering.steps(
      self._loop, turn.ids, turn.closing, request, self._sources),
      self._loop.context)

  def _turn(self, prompt: Prompt, template: bool = True,
            system: str | None = None) -> prompts.Turn:
    """The prompt as the history takes it; it leads the focus from now on."""
    tokenizer = self.lm.tokenizer
    messages = prompts.messages_of(prompt)
    if template:
      messages = prompts.with_system(
        messages, self.system if system is None else system)
    turn = prompts.turn(
      messages, self.tree, tokenizer, template and self.config.chat == "auto"
      and tokenizer.has_chat_template)
    self._loop.query = turn.query
    return turn

  @locked
  def score(self, text: str) -> np.ndarray:
    """NLL of each token of `text`, [tokens] float32 in nats.

    Teacher-forced through the loop. The text is not remembered: tree, focus
    and cache are as before. The very first token of an empty history has no
    prediction and is NaN.

    Raises:
      McjaxError: the text is empty or not a string.
    """
    self._check_text(text, "text")
    with self._loop.warm_up_beside():
      return self._loop.score(self.lm.tokenizer.encode(text))

  def _check_prompt(self, prompt: Prompt) -> None:
    self._check_open()
    if self.config.policy == "oracle":
      raise McjaxError(
        "policy oracle needs the true continuation: it works in score only")
    prompts.messages_of(prompt)
