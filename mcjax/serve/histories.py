"""Histories by name: folders of trees, the newest few open in an engine."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pathlib
import re
import shutil
import tempfile
import threading
import time

from absl import logging

from mcjax.runtime.engine import Engine
from mcjax.runtime.megacontext import MegaContext
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,99}")


class UnknownHistory(McjaxError):
  """No history has this name."""


class HistoriesBusy(McjaxError):
  """No slot became free in time, or a history is in use."""


class Histories:
  """Opens histories on use; closes the one that idles longest when full.

  Those who wait for a slot get one in the order in which they came.
  """

  def __init__(self, engine: Engine, root: str, wait: float = 600.0):
    """Args: root: folder of the trees. wait: for a slot, seconds at most."""
    self.engine, self._root = engine, pathlib.Path(root)
    self._root.mkdir(parents=True, exist_ok=True)
    self._wait = wait
    self._open: dict[str, MegaContext] = {}
    self._opening: set[str] = set()
    self._closing: set[str] = set()
    self._users: dict[str, int] = {}
    self._used: dict[str, float] = {}
    self._queue: list[object] = []  # of those who wait for a slot
    self._changed = threading.Condition()

  def names(self) -> list[str]:
    """All histories, sorted."""
    return sorted(p.name for p in self._root.iterdir()
                  if MegaContextTree.exists(p))

  def exists(self, name: str) -> bool:
    """Whether there is such a history. Raises: McjaxError on a bad name."""
    return MegaContextTree.exists(self._path(name))

  @contextlib.contextmanager
  def passing(self) -> Iterator[MegaContext]:
    """An empty history without a name, which is gone afterwards.

    Raises:
      HistoriesBusy: no slot became free.
    """
    with tempfile.TemporaryDirectory() as folder:
      mc = self._taken(folder, True, pathlib.Path(folder) / "history")
      try:
        yield mc
      finally:
        with self._changed:
          del self._open[folder], self._users[folder]
          _close(mc)
          self._changed.notify_all()

  @contextlib.contextmanager
  def use(self, name: str, create: bool = False) -> Iterator[MegaContext]:
    """A history, kept open meanwhile.

    Raises:
      UnknownHistory: it is not there and is not to be made.
      HistoriesBusy: no slot became free.
      McjaxError: a bad name, or the tree cannot be opened.
    """
    mc = self._taken(name, create, self._path(name))
    try:
      yield mc
    finally:
      with self._changed:
        self._users[name] -= 1
        self._used[name] = time.monotonic()
        self._changed.notify_all()

  def _taken(self, name: str, create: bool, path: pathlib.Path
             ) -> MegaContext:
    ticket = object()
    with self._changed:
      self._queue.append(ticket)
      try:
        if not self._changed.wait_for(
            lambda: self._may_start(name, ticket), self._wait):
          raise HistoriesBusy("all histories are busy: try again")
        if name in self._open:
          self._users[name] += 1
          return self._open[name]
        there = MegaContextTree.exists(path)
        if not there and not create:
          raise UnknownHistory(f"there is no history {name!r}")
        old = self._idle() if self._is_full() else None
        leaving = self._open.pop(old) if old else None
        self._opening.add(name)
        self._closing |= {old} if old else set()
      finally:
        self._queue.remove(ticket)
        self._changed.notify_all()
    return self._opened(name, path, create and not there, old, leaving)

  def _may_start(self, name: str, ticket: object) -> bool:
    if name in self._open:
      return True
    if name in self._opening or name in self._closing:
      return False
    return self._queue[0] is ticket and (
      not self._is_full() or self._idle() is not None)

  def _is_full(self) -> bool:
    return len(self._open) + len(self._opening) >= self.engine.slots

  def _idle(self) -> str | None:
    """The open history that nobody uses, and nobody has for longest."""
    idle = [n for n in self._open if not self._users.get(n)]
    return min(idle, key=lambda n: self._used.get(n, 0.0), default=None)

  def _opened(self, name: str, path: pathlib.Path, create: bool,
              old: str | None, leaving: MegaContext | None) -> MegaContext:
    """Opens a history in the place of one that leaves; others go on."""
    mc = None
    try:
      if leaving is not None:
        _close(leaving)
      make = self.engine.create if create else self.engine.open
      mc = make(str(path))
      return mc
    finally:
      with self._changed:
        self._opening.discard(name)
        self._closing -= {old}
        if mc is not None:
          self._open[name], self._users[name] = mc, 1
        self._changed.notify_all()

  def delete(self, name: str) -> None:
    """Removes a history for good.

    Raises:
      UnknownHistory: there is none.
      HistoriesBusy: it is in use.
      McjaxError: a bad name.
    """
    with self._changed:
      if not self.exists(name):
        raise UnknownHistory(f"there is no history {name!r}")
      if (self._users.get(name) or name in self._opening
          or name in self._closing):
        raise HistoriesBusy(f"history {name!r} is in use")
      if name in self._open:
        self._open.pop(name).close()
      shutil.rmtree(self._path(name))

  def close(self) -> None:
    """Commits and closes them all, answers at work included."""
    with self._changed:
      for mc in self._open.values():
        _close(mc)
      self._open.clear()

  def _path(self, name: str) -> pathlib.Path:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise McjaxError(
        "a history's name has 1 to 100 letters, digits and . _ @ -, and "
        f"begins with a letter or digit; got {name!r}")
    return self._root / name


def _close(mc: MegaContext) -> None:
  """Closes a history for another's sake, who has no part in its failure."""
  try:
    mc.close()
  except McjaxError as error:
    logging.error("closing %s: %s", mc.tree.url, error)
