"""Holds a stored tree against everything that must be true of it.

Needs no models: what a network made is held against its checksums, all that
follows from something else is computed again. Reads the whole tree, in bounded
memory, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import os
import time
from typing import Any

import numpy as np

from mcjax.tree import commits, local_files
from mcjax.tree import format as tree_format
from mcjax.tree.columns import Column
from mcjax.tree.counts import AccessCounts, TokenFrequency, frequency_spec
from mcjax.tree.derive import NodeMaker
from mcjax.tree.format import Place
from mcjax.tree.journal import FORGOTTEN, Journal
from mcjax.tree.rewrite import open_column, recounted
from mcjax.tree.store import (
  COPY_KEY,
  RECORD_KEY,
  ArraySpec,
  Store,
  decode_record,
)
from mcjax.types import McjaxError, span_width

_TOKENS = 1 << 18  # of a slice that is computed again at once
# What can be done about a finding, from the first to be done to the last.
MENDS = ("record", "metadata", "sums", "derive", "recount", "drop")


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that is not as it must be.

  Attributes:
    where: key or path of what it is about.
    what: in words.
    rows: which rows, [start, stop) each; empty where it is not about rows.
    mend: what repairs it, one of `MENDS`, or "" where nothing can.
    harmless: no content is in doubt.
  """

  where: str
  what: str
  rows: tuple[tuple[int, int], ...] = ()
  mend: str = ""
  harmless: bool = False

  def __str__(self) -> str:
    at = ", ".join(f"{a}:{b}" for a, b in self.rows[:4])
    more = ", …" if len(self.rows) > 4 else ""
    return f"{self.where}{f' [{at}{more}]' if at else ''}: {self.what}"


@dataclasses.dataclass
class Report:
  """What a check found.

  Attributes:
    url: of the tree.
    findings: all of them.
    record: the newest commit record that can be read; empty without one.
    rows: rows checked, by path.
    seconds: the check took.
  """

  url: str
  findings: list[Finding] = dataclasses.field(default_factory=list)
  record: dict[str, Any] = dataclasses.field(default_factory=dict)
  rows: dict[str, int] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0

  @property
  def damage(self) -> list[Finding]:
    return [f for f in self.findings if not f.harmless]

  def as_json(self) -> dict[str, Any]:
    return {
      "url": self.url,
      "clean": not self.damage,
      "commit": self.record.get("commit"),
      "version": self.record.get("version"),
      "tokens": self.record.get("cursor"),
      "rows": self.rows,
      "findings": [dataclasses.asdict(f) for f in self.findings],
      "seconds": round(self.seconds, 3),
    }


def check(url: str | os.PathLike[str]) -> Report:
  """Checks everything in a tree; also beside a writer.

  Raises:
    McjaxError: no tree is there, or it is of a newer format.
  """
  begin = time.perf_counter()
  store = Store(url)
  report = Report(store.url)
  if not commits.exists(store):
    raise McjaxError(f"there is no tree at {store.url}")
  _check_record(store, report)
  if report.record:
    _Check(store, report).run()
  report.seconds = time.perf_counter() - begin
  return report


def _check_record(store: Store, report: Report) -> None:
  """Reads the record; findings where it or its copy is not as it must be."""
  copy = _read(store, COPY_KEY)  # first: a writer may commit meanwhile
  record = _read(store, RECORD_KEY)
  if isinstance(record, dict):
    tree_format.check_readable(record, store.url)
    report.record = record
  older = isinstance(record, dict) and isinstance(copy, dict) and (
    copy.get("commit", 0) > record.get("commit", 0))
  if not isinstance(record, dict) or older:
    what = "an older one that was put back" if older else record
    usable = isinstance(copy, dict)
    report.findings.append(Finding(
      RECORD_KEY, str(what), mend="record" if usable else ""))
    if usable:
      tree_format.check_readable(copy, store.url)
      report.record = copy
  elif copy != record and record.get("version", 0) > 2:
    what = copy if isinstance(copy, str) else "of an older commit"
    report.findings.append(Finding(
      COPY_KEY, what, mend="record", harmless=True))


def _read(store: Store, key: str) -> dict[str, Any] | str:
  """A record, or what is wrong with it."""
  try:
    raw, _ = store.read_record(key)
    if raw is None:
      return "is missing"
    return decode_record(raw, store.url)
  except McjaxError as error:
    return str(error)


class _Check:
  """One check of everything that a record names."""

  def __init__(self, store: Store, report: Report):
    self._store, self._record = store, report.record
    self._report = report
    self._columns: dict[tuple[str, int], Column] = {}
    self._bad: set[tuple[str, int]] = set()
    dtype = self._record["gist_dtype"]
    self._maker = NodeMaker(self._column, dtype, None, None)

  def _column(self, kind: str, level: int) -> Column:
    if (kind, level) not in self._columns:
      raise McjaxError(f"the {kind} of level {level} cannot be opened")
    return self._columns[kind, level]

  def _find(self, where: str, what: str, **more) -> None:
    self._report.findings.append(Finding(where, what, **more))

  def run(self) -> None:
    places = tree_format.places(self._record)
    for place in places:
      self._check_rows(place)
    for place in places:
      if (place.kind, place.level) in self._columns:
        self._check_content(place)
    self._check_frequency()
    self._check_access()
    self._check_keys()

  # Rows are those that were committed.

  def _check_rows(self, place: Place) -> None:
    try:
      column = open_column(self._store, self._record, place)
    except McjaxError as error:
      self._find(_metadata(place.path, error), str(error), mend="metadata")
      return
    self._columns[place.kind, place.level] = column
    self._report.rows[place.path] = place.length
    self._check_sums(column)
    if rows := merged(column.damage()):
      mend = "derive" if place.level else ""
      self._bad.add((place.kind, place.level))
      self._find(place.path, "rows are lost, or not those that were committed"
                 + ("" if mend else f"; {_unread(place)}"),
                 rows=rows, mend=mend)

  def _check_sums(self, column: Column) -> None:
    if column.sums is None:
      return
    self._check_sums(column.sums)
    if rows := merged(column.sums.damage()):
      self._find(column.sums.path, "checksums are damaged", rows=rows,
                 mend="sums")

  # Content is what it must be.

  def _check_content(self, place: Place) -> None:
    step = max(1, _TOKENS // span_width(place.level))
    if place.kind == "journal":
      self._check_journal()
      return
    wrong: list[tuple[int, int]] = []
    for start in range(0, place.length, step):
      stop = min(start + step, place.length)
      try:
        bad = self._wrong(place, start, stop)
      except McjaxError:
        continue  # told already: something it needs is damaged
      found = (start + np.flatnonzero(bad)).tolist()
      wrong += [(i, i + 1) for i in found]
    if rows := merged(wrong):
      self._find(place.path, _CONTENT[place.kind], rows=rows,
                 mend="derive" if place.level else "")

  def _wrong(self, place: Place, start: int, stop: int) -> np.ndarray:
    """Which of the rows cannot be right: bool [n]."""
    rows = self._column(place.kind, place.level).read(start, stop)
    if place.kind == "tokens":
      return rows >= self._record["vocab_size"]
    if place.kind == "gists":
      return ~np.isfinite(tree_format.unpack_gists(rows).sum(axis=1))
    if place.kind == "lens" and place.level == 1:
      return (rows == -128).any(axis=1)
    made = self._maker.rows(place.kind, place.level, start, stop)
    return (rows != made).any(axis=1)

  def _check_journal(self) -> None:
    path = tree_format.folder("journal", self._record)
    if ("journal", 0) in self._bad:
      return
    try:
      journal = Journal(
        self._store, self._record.get("journal", 0), self._record.get("sums"),
        path)
    except McjaxError as error:
      self._find(path, str(error))
      return
    cursor, documents = self._record["cursor"], set()
    for event in journal.events:
      span = event.get("start", 0), event.get("stop", 0)
      if not 0 <= span[0] <= span[1] <= cursor:
        self._find(path, f"{event['kind']} of tokens {span} of {cursor}")
      if event["kind"] == FORGOTTEN and span not in documents:
        self._find(path, f"no document of tokens {span} to forget",
                   harmless=True)
      documents.add(span)

  # Counts.

  def _check_frequency(self) -> None:
    state, vocab = self._record["frequency"], self._record["vocab_size"]
    spec = frequency_spec(vocab)
    if state["blocks"] and not self._opens("frequency", spec):
      return
    try:
      stored = TokenFrequency(self._store, vocab, **state)
    except McjaxError as error:
      self._find("frequency", str(error), mend="recount")
      return
    tokens = self._columns.get(("tokens", 0))
    if tokens is None or ("tokens", 0) in self._bad:
      return
    right = recounted(self._store, vocab, tokens, state["blocks"])
    if not np.array_equal(right.counts, stored.counts):
      self._find("frequency", "counts are not those of the tokens",
                 mend="recount")

  def _opens(self, path: str, spec: ArraySpec, harmless: bool = False
             ) -> bool:
    try:
      self._store.array(path, spec, create=False)
    except McjaxError as error:
      self._find(path, str(error), mend="metadata", harmless=harmless)
      return False
    return True

  def _check_access(self) -> None:
    counts, level = AccessCounts(self._store), 0
    while (nodes := self._record["cursor"] // span_width(level)) > 0:
      path, step = f"access/L{level}", 1 << 20
      try:
        if self._store.has_array(path) and self._opens(
            path, AccessCounts.SPEC, harmless=True):
          for start in range(0, nodes, step):
            counts.read(level, start, min(start + step, nodes))
      except McjaxError as error:
        self._find(path, str(error), mend="drop", harmless=True)
      level += 1

  # Files.

  def _check_keys(self) -> None:
    """Tells of what is no plain file, and of files that belong to no column.

    The latter do no harm.
    """
    if (folder := self._store.folder) is not None:
      for key, what in local_files.strange(folder):
        self._find(key, f"{what}; delete it, then run --repair")
    folders = tree_format.epoch_folders(self._record)
    past = tree_format.past_folders(self._record) - folders
    left, strange = 0, []
    for key in self._store.keys():
      if any(key.startswith(f + "/") for f in folders) or key.startswith(
          ("access/", "frequency/", "mcjax_tree.")):
        continue
      if any(key.startswith(f + "/") for f in past):
        left += 1
      else:
        strange.append(key)
    if left:
      self._find("", f"{left} files of past epochs are left; --compact deletes"
                 " them", harmless=True)
    for key in strange[:9]:
      self._find(key, "is not of this tree", harmless=True)


_CONTENT = {
  "tokens": "ids are not in the vocabulary",
  "gists": "gists are not finite",
  "keys": "keys are not those of the tokens below",
  "lens": "keys are not the bounds of those below",
}


def _unread(place: Place) -> str:
  kept = "tokens are never guessed" if place.kind == "tokens" else (
    "events cannot be made anew")
  return f"{kept}: put the file back from a backup"


def _metadata(path: str, error: McjaxError) -> str:
  """The key of the array that cannot be opened."""
  for part in ("/packed", "/sums/sums", "/sums"):
    if path + part in str(error):
      return path + part
  return path


def merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
  """Sorted spans, those that touch as one."""
  out: list[tuple[int, int]] = []
  for start, stop in spans:
    if out and start <= out[-1][1]:
      out[-1] = out[-1][0], max(stop, out[-1][1])
    else:
      out.append((start, stop))
  return tuple(out)
