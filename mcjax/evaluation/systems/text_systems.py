"""Systems that write one prompt: some of the history, then the question.

They differ only in what of the history they choose. The base reads it anew for
every question, with positions from 0 on, so nothing is lost to a cache that
was made in another context.
"""

from __future__ import annotations

import time

import numpy as np

from mcjax.config import Config
from mcjax.evaluation.systems import baselines
from mcjax.evaluation.systems.plain_reader import PlainReader
from mcjax.evaluation.systems.retrieval import Retriever
from mcjax.evaluation.systems.system import (
  ANSWER,
  Look,
  Reply,
  Spans,
  difference,
  gathered,
  merged,
)
from mcjax.types import McjaxError

_STRIDE = 64  # tokens scored between two searches (Ram et al. 2023)
_SINK = Config().sink_tokens


class TextSystem:
  """Nothing of the history: what the base knows by itself.

  Args:
    reader: of the base.
    window: tokens of prompt and answer.
    in_turn: the text stands inside the user's turn, not before it.

  Attributes:
    name: see `System`.
  """

  name = "none"

  def __init__(self, reader: PlainReader, window: int, in_turn: bool = False):
    self.reader, self.window, self.in_turn = reader, window, in_turn
    self.history = np.zeros(0, np.int32)
    self._said = np.zeros(0, np.int32)
    self._view: Spans = ()

  def ingest(self, ids: np.ndarray) -> None:
    self.history = np.asarray(ids, np.int32)
    self._said, self._view = self._said[:0], ()

  def close(self) -> None:
    self.history = self.history[:0]

  @property
  def forwarded(self) -> int:
    """Tokens that the base ran on, for every system of this reader."""
    return self.reader.forwarded

  # --- what it sees -------------------------------------------------------

  def look(self, question: str, *, budget: int | None = None,
           evidence: Spans = ()) -> Look:
    if budget is None:
      budget = self._room(question, ANSWER)
    view = merged(self._choose(question, budget, evidence))
    return Look(view, view)

  def _choose(self, question: str, budget: int, evidence: Spans) -> Spans:
    """Spans of the history, `budget` tokens at most."""
    return ()

  def _room(self, question: str, limit: int) -> int:
    """Tokens of the window that are left for the history."""
    turn = len(self._turn(question, first=False))
    return max(0, self.window - turn - limit - len(self._conversation()))

  # --- what it says -------------------------------------------------------

  def answer(self, question: str, limit: int, *, evidence: Spans = (),
             remember: bool = False) -> Reply:
    begin, before = time.perf_counter(), self.reader.forwarded
    seen = self.look(question, budget=self._room(question, limit),
                     evidence=evidence)
    prompt = self._prompt(seen.view, question)
    out = self.reader.generate(prompt, limit)
    brought, put_away = difference(self._view, seen.view)
    if remember:
      self._view = seen.view
      self._remember(question, out)
    return Reply(
      self.reader.lm.tokenizer.decode(out.tolist()),
      seen._replace(brought=brought, put_away=put_away),
      self.reader.forwarded - before, time.perf_counter() - begin)

  def _prompt(self, view: Spans, question: str) -> np.ndarray:
    tokenizer = self.reader.lm.tokenizer
    line = tokenizer.encode("\n")
    text, said = gathered(self.history, view, line), self._conversation()
    if self.in_turn and len(text):
      words = tokenizer.decode(text.tolist())
      question, text = f"{words}\n\n{question}", text[:0]
    if len(text):
      text = np.concatenate([text, line])
    turn = self._turn(question, first=not len(text) and not len(said))
    return np.concatenate([self._bos(), text, said, turn]).astype(np.int32)

  def _turn(self, question: str, first: bool) -> np.ndarray:
    return self.reader.lm.tokenizer.chat_turn(question, first)[0]

  def _bos(self) -> np.ndarray:
    bos = self.reader.lm.tokenizer.bos_id
    return np.array([] if bos is None else [bos], np.int32)

  def _conversation(self) -> np.ndarray:
    """The newest of what was said, a quarter of the window at most."""
    return self._said[-(self.window // 4):]

  def _remember(self, question: str, answer: np.ndarray) -> None:
    tokenizer = self.reader.lm.tokenizer
    closing = tokenizer.end_of_turn_ids
    if len(answer) and len(closing) and answer[-1] == closing[0]:
      closing = closing[1:]
    turn = self._turn(question, first=False)
    self._said = np.concatenate([self._said, turn, answer, closing])

  # --- what it expects ----------------------------------------------------

  def nll(self, ids: np.ndarray) -> np.ndarray:
    return self.reader.nll(self._bos(), ids)


class Evidence(TextSystem):
  """Told where the evidence is, and reads nothing else."""

  name = "evidence"

  def _choose(self, question: str, budget: int, evidence: Spans) -> Spans:
    return cut(merged(evidence), budget)

  def nll(self, ids: np.ndarray) -> np.ndarray:
    raise McjaxError(f"system {self.name} needs a question: it has no losses")


class FullAttention(TextSystem):
  """The whole history, where the base has as many positions."""

  name = "full"

  def _choose(self, question: str, budget: int, evidence: Spans) -> Spans:
    return ((0, len(self.history)),)

  def nll(self, ids: np.ndarray) -> np.ndarray:
    return self.reader.nll(np.concatenate([self._bos(), self.history]), ids)


class SlidingWindow(TextSystem):
  """The newest tokens, and with a sink the first ones (StreamingLLM).

  Losses are those of a window that slides token by token and keeps its keys and
  values (Xiao et al. 2024); an answer's window is read anew.
  """

  name = "sliding"
  sink = 0

  def _choose(self, question: str, budget: int, evidence: Spans) -> Spans:
    sink = min(self.sink, budget, len(self.history))
    newest = max(sink, len(self.history) - (budget - sink))
    return merged([(0, sink), (newest, len(self.history))])

  def nll(self, ids: np.ndarray) -> np.ndarray:
    config = Config(window=self.window, sink_tokens=self.sink)
    # What came before the window has no part in it.
    kept = self.window + self.sink
    before = np.concatenate([self._bos(), self.history])
    if len(before) > kept:
      before = np.concatenate([before[: self.sink], before[-self.window :]])
    both = np.concatenate([before, ids])
    start = max(1, len(before))
    found, forwarded = baselines.sliding_window_nll(
      self.reader.lm, config, both, start)
    self.reader.forwarded += forwarded
    missing = np.full(start - len(before), np.nan, np.float32)
    return np.concatenate([missing, found])


class SinkWindow(SlidingWindow):
  """The first tokens and the newest ones."""

  name = "sink"
  sink = _SINK


class Retrieval(TextSystem):
  """The chunks of the history that a retriever ranks first.

  Losses: every `_STRIDE` tokens a search for the newest ones, the chunks found
  stand before the newest half of the window (Ram et al. 2023).
  """

  def __init__(self, reader: PlainReader, window: int, retriever: Retriever,
               name: str, in_turn: bool = False):
    super().__init__(reader, window, in_turn)
    self.name, self._retriever = name, retriever

  def ingest(self, ids: np.ndarray) -> None:
    super().ingest(ids)
    self._retriever.index(self.history)

  def _choose(self, question: str, budget: int, evidence: Spans) -> Spans:
    return cut(self._retriever.ranked(question, self.name), budget)

  def nll(self, ids: np.ndarray) -> np.ndarray:
    tokenizer = self.reader.lm.tokenizer
    known, out = self.history, []
    for a in range(0, len(ids), _STRIDE):
      part = ids[a : a + _STRIDE]
      newest = known[-(self.window // 2 - _STRIDE):]
      query = tokenizer.decode(known[-_STRIDE:].tolist())
      old = len(self.history) - max(0, len(newest) - a)
      found = tuple(s for s in self._retriever.ranked(query, self.name)
                    if s[1] <= old)
      view = merged(cut(found, self.window - len(newest) - len(part)))
      text = gathered(self.history, view, tokenizer.encode("\n"))
      out.append(self.reader.nll(
        np.concatenate([self._bos(), text, newest]), part))
      known = np.concatenate([known, part])
    return np.concatenate(out)


def cut(ranked: Spans, budget: int) -> Spans:
  """The first of these spans, as far as `budget` tokens go."""
  out = []
  for start, stop in ranked:
    stop = min(stop, start + budget)
    if stop <= start:
      break
    out.append((start, stop))
    budget -= stop - start
  return tuple(out)
