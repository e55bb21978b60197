"""The journal of a tree: small events beside the tokens, and what is forgotten.

An append-only log of JSON lines, kept as a column of bytes: which documents
came in and where they lie, which spans of tokens are forgotten. It is flushed
before the commit record, which says how many bytes of it count.
"""

from __future__ import annotations

from collections.abc import Mapping
import json

import numpy as np

from mcjax.tree.columns import Column
from mcjax.tree.format import JOURNAL_SPEC
from mcjax.tree.store import MAX_ROWS, Store
from mcjax.types import BRANCHING, McjaxError, span_width

FORGOTTEN = "forgotten"  # kind of an event that hides tokens [start, stop)


class Journal:
  """Events in the order they happened.

  Attributes:
    column: their JSON lines.
    events: as dictionaries; "kind" says what each one is.
    forgotten: [n, 2] int64, disjoint sorted spans of tokens that nobody may
      see any more.
  """

  def __init__(self, store: Store, length: int,
               sums: Mapping[str, int] | None = None, path: str = "journal"):
    """Reads `length` bytes. Raises: McjaxError if they are no JSON lines."""
    self.column = Column(store, path, JOURNAL_SPEC, length, sums)
    lines = self.column.read(0, length).tobytes()
    try:
      self.events = [json.loads(line) for line in lines.splitlines()]
      if not all(map(_is_event, self.events)):
        raise ValueError("a line is no event")
    except (ValueError, RecursionError) as error:
      raise McjaxError(f"the journal of {store.url} is damaged: {error}"
                       ) from error
    self.forgotten = self._merged()
    self._edges, self._known = np.zeros(0, np.int64), 0

  def add(self, kind: str, **fields) -> None:
    """Adds an event, durable with the next commit of the tree.

    Raises:
      McjaxError: the fields are no JSON.
    """
    event = {"kind": kind, **fields}
    try:
      line = json.dumps(event, separators=(",", ":")) + "\n"
    except (TypeError, ValueError) as error:
      raise McjaxError(f"not JSON: {error}") from error
    self.column.append(np.frombuffer(line.encode(), np.uint8))
    self.events.append(json.loads(line))
    if kind == FORGOTTEN:
      self.forgotten = self._merged()

  def of(self, *kinds: str) -> list[dict]:
    """The events of some kinds."""
    return [event for event in self.events if event["kind"] in kinds]

  def _merged(self) -> np.ndarray:
    spans: list[list[int]] = []
    gone = [(e["start"], e["stop"]) for e in self.of(FORGOTTEN)]
    for start, stop in sorted(gone):
      if spans and start <= spans[-1][1]:
        spans[-1][1] = max(spans[-1][1], stop)
      else:
        spans.append([start, stop])
    return np.array(spans, np.int64).reshape(-1, 2)

  def edges(self, start: int, stop: int) -> np.ndarray:
    """Which of tokens [start, stop) follow an edge of an event's span, bool."""
    if self._known < len(self.events):
      new = [e for e in self.events[self._known :] if "start" in e]
      more = [place for e in new for place in (e["start"], e["stop"])]
      self._edges = np.union1d(self._edges, np.array(more, np.int64))
      self._known = len(self.events)
    out = np.zeros(stop - start, bool)
    low, high = np.searchsorted(self._edges, [start, stop])
    out[self._edges[low:high] - start] = True
    return out

  def snapshot(self) -> tuple:
    """A state to `restore`."""
    return self.column.snapshot(), len(self.events), self.forgotten

  def restore(self, state: tuple) -> None:
    """Forgets the events since a snapshot."""
    column, count, self.forgotten = state
    self.column.restore(column)
    del self.events[count:]
    self._edges, self._known = np.zeros(0, np.int64), 0


def _is_event(event: object) -> bool:
  """Whether it has a kind and, where it has a place, a possible one."""
  if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
    return False
  span = [event.get(name) for name in ("start", "stop") if name in event]
  if event["kind"] == FORGOTTEN and len(span) < 2:
    return False
  return all(type(at) is int and 0 <= at <= MAX_ROWS for at in span)


def overlaps(spans: np.ndarray, start: np.ndarray, stop: np.ndarray
             ) -> np.ndarray:
  """Whether [start, stop) shares a token with a span, [n] bool.

  Args:
    spans: [m, 2] disjoint and sorted.
    start: int [n].
    stop: int [n].
  """
  if not len(spans):
    return np.zeros(len(start), bool)
  at = np.searchsorted(spans[:, 1], start, side="right")
  known = at < len(spans)
  return known & (spans[np.minimum(at, len(spans) - 1), 0] < stop)


def touched(spans: np.ndarray, blocks: np.ndarray) -> np.ndarray:
  """Whether a block of 32 tokens shares a token with a span, [n] bool.

  Args:
    spans: [m, 2] disjoint and sorted.
    blocks: int [n].
  """
  return overlaps(spans, blocks * BRANCHING, (blocks + 1) * BRANCHING)


def wholly_inside(spans: np.ndarray, level: int, first: int, last: int
                  ) -> np.ndarray:
  """Whether nodes [first, last) of a level lie within a span, [n] bool."""
  index = np.arange(first, last, dtype=np.int64)
  if not len(spans):
    return np.zeros(len(index), bool)
  width = span_width(level)
  at = np.searchsorted(spans[:, 1], index * width, side="right")
  known = at < len(spans)
  start, stop = spans[np.minimum(at, len(spans) - 1)].T
  return known & (start <= index * width) & ((index + 1) * width <= stop)
