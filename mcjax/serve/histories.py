"""Histories by name: folders of trees, the newest few open in an engine."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pathlib
import re
import shutil
import threading
import time

from mcjax.runtime.engine import Engine
from mcjax.runtime.megacontext import MegaContext
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,99}")
_WAIT = 60.0  # seconds to wait for a slot


class UnknownHistory(McjaxError):
  """No history has this name."""


class Histories:
  """Opens histories on use; closes the one that idles longest when full."""

  def __init__(self, engine: Engine, root: str):
    """Args: root: folder that holds a tree for every history."""
    self.engine, self._root = engine, pathlib.Path(root)
    self._root.mkdir(parents=True, exist_ok=True)
    self._open: dict[str, MegaContext] = {}
    self._users: dict[str, int] = {}
    self._used: dict[str, float] = {}
    self._free = threading.Condition()

  def names(self) -> list[str]:
    """All histories, sorted."""
    return sorted(p.name for p in self._root.iterdir()
                  if MegaContextTree.exists(p))

  def exists(self, name: str) -> bool:
    """Whether there is such a history. Raises: McjaxError on a bad name."""
    return MegaContextTree.exists(self._path(name))

  @contextlib.contextmanager
  def use(self, name: str, create: bool = False) -> Iterator[MegaContext]:
    """A history, kept open meanwhile.

    Raises:
      UnknownHistory: it is not there and is not to be made.
      McjaxError: a bad name, or no slot became free.
    """
    path = self._path(name)
    with self._free:
      if name not in self._open:
        there = MegaContextTree.exists(path)
        if not there and not create:
          raise UnknownHistory(f"there is no history {name!r}")
        self._make_room()
        make = self.engine.open if there else self.engine.create
        self._open[name] = make(str(path))
      mc = self._open[name]
      self._users[name] = self._users.get(name, 0) + 1
    try:
      yield mc
    finally:
      with self._free:
        self._users[name] -= 1
        self._used[name] = time.monotonic()
        self._free.notify_all()

  def _make_room(self) -> None:
    """Closes a history that nobody uses, if all slots are taken."""
    end = time.monotonic() + _WAIT
    while len(self._open) >= self.engine.slots:
      idle = [n for n in self._open if not self._users.get(n)]
      if idle:
        name = min(idle, key=lambda n: self._used.get(n, 0.0))
        self._open.pop(name).close()
      elif not self._free.wait(end - time.monotonic()):
        raise McjaxError("all histories are busy: try again")

  def delete(self, name: str) -> None:
    """Removes a history for good. Raises: McjaxError, in use or unknown."""
    with self._free:
      if not self.exists(name):
        raise UnknownHistory(f"there is no history {name!r}")
      if self._users.get(name):
        raise McjaxError(f"history {name!r} is in use")
      if name in self._open:
        self._open.pop(name).close()
      shutil.rmtree(self._path(name))

  def close(self) -> None:
    """Commits and closes them all, answers at work included."""
    with self._free:
      for mc in self._open.values():
        mc.close()
      self._open.clear()

  def _path(self, name: str) -> pathlib.Path:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise McjaxError(
        "a history's name has 1 to 100 letters, digits and . _ @ -, and "
        f"begins with a letter or digit; got {name!r}")
    return self._root / name
