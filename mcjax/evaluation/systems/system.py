"""What is compared: one interface for the loop and for everything beside it.

A system takes in a history once, as token ids of the base, and is then asked.
Places in the history are token spans (start, stop) of those ids, so that what
a system has in view can be held against where the evidence lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Spans = tuple[tuple[int, int], ...]

ANSWER = 64  # tokens of the window that are kept for an answer


class Look(NamedTuple):
  """What a system would answer from; no base LM has run.

  Attributes:
    view: spans of the history that stand raw in its window.
    read: those of them that the LM attends to for the answer.
    edits: expands and collapses that it took; 0 where there are none.
    brought: tokens that came into view since the last look or answer.
    put_away: tokens that left it.
  """

  view: Spans
  read: Spans
  edits: int = 0
  brought: int = 0
  put_away: int = 0


class Reply(NamedTuple):
  """An answer and what it cost.

  Attributes:
    text: of the answer.
    look: what it was answered from.
    forwarded: tokens that the base LM ran on.
    seconds: wall clock.
    answerable: how sure the system is that the history holds an answer, in
      [0, 1]; None where it does not tell.
  """

  text: str
  look: Look
  forwarded: int
  seconds: float
  answerable: float | None = None


class System(Protocol):
  """A way to answer from a history that is longer than the window.

  Attributes:
    name: as it is asked for, see `make.Maker`.
  """

  name: str

  @property
  def forwarded(self) -> int:
    """Tokens that the base LM ran on so far, since the history at least."""

  def ingest(self, ids: np.ndarray) -> None:
    """Takes in a history [n] int32; what was there before is forgotten."""

  def look(self, question: str, *, budget: int | None = None,
           evidence: Spans = ()) -> Look:
    """What it would answer a question from; nothing is remembered.

    Args:
      question: a user's words.
      budget: most tokens of the history; None for what the window holds. The
        loop decides that itself.
      evidence: where the answer is, for the systems that are told.
    """

  def answer(self, question: str, limit: int, *, evidence: Spans = (),
             remember: bool = False) -> Reply:
    """Answers with at most `limit` tokens; greedy.

    Args:
      question: a user's words.
      limit: of new tokens.
      evidence: where the answer is, for the systems that are told.
      remember: question and answer join the conversation.

    Raises:
      McjaxError: this system cannot hold a history of this length.
    """

  def nll(self, ids: np.ndarray) -> np.ndarray:
    """NLL [n] in nats of what follows the history; not remembered.

    NaN where there is no prediction.

    Raises:
      McjaxError: it cannot: too long a history, or it needs a question.
    """

  def close(self) -> None:
    """Lets go of the history."""


def merged(spans: Iterable[tuple[int, int]]) -> Spans:
  """The same tokens as disjoint spans in order."""
  out: list[tuple[int, int]] = []
  for start, stop in sorted(s for s in spans if s[0] < s[1]):
    if out and start <= out[-1][1]:
      out[-1] = (out[-1][0], max(stop, out[-1][1]))
    else:
      out.append((start, stop))
  return tuple(out)


def runs(tokens: np.ndarray) -> Spans:
  """Spans of rising token places [n]."""
  if not len(tokens):
    return ()
  cuts = np.flatnonzero(np.diff(tokens) != 1) + 1
  return tuple((int(part[0]), int(part[-1]) + 1)
               for part in np.split(tokens, cuts))


def size(spans: Spans) -> int:
  """Tokens in disjoint spans."""
  return sum(stop - start for start, stop in spans)


def shared(spans: Spans, others: Spans) -> int:
  """Tokens that lie in both of two lists of disjoint spans."""
  return sum(max(0, min(b, d) - max(a, c))
             for a, b in spans for c, d in others)


def difference(before: Spans, after: Spans) -> tuple[int, int]:
  """Tokens that came in and that went out from one view to the next."""
  both = shared(before, after)
  return size(after) - both, size(before) - both


def gathered(ids: np.ndarray, spans: Sequence[tuple[int, int]],
             gap: np.ndarray) -> np.ndarray:
  """The tokens of spans in order, `gap` between any two."""
  parts: list[np.ndarray] = []
  for start, stop in spans:
    parts += [gap] * bool(parts) + [ids[start:stop]]
  return np.concatenate(parts).astype(np.int32) if parts else ids[:0]
