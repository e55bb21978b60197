"""One writer at a time: who holds a tree, and how another one is refused.

On local files the lock is the kernel's (`flock`), held from open to close, so
it goes with its process, however that ends. On an object store it is a lease
(`lease`). A tree in `memory://` is locked in the process it lives in. Readers
take no lock.

mcjax_tree.lock        what is locked; stays, empty
mcjax_tree.owner.json  who holds it, for messages; left behind by a process
                       that was killed
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from typing import Protocol
import weakref

import filelock

from mcjax.tree import local_files
from mcjax.tree.lease import LeaseLock
from mcjax.tree.owner import Owner, refusal
from mcjax.tree.store import RECORD_KEY, Store
from mcjax.types import McjaxError

LOCK_NAME = "mcjax_tree.lock"
OWNER_NAME = "mcjax_tree.owner.json"
_OWNER_BYTES = 4096  # no owner's file is longer


class WriterLock(Protocol):
  """The right to write one tree.

  Attributes:
    crashed: the owner before, if it did not close.
  """

  crashed: Owner | None

  def check(self) -> None:
    """Raises McjaxError if the right is lost or its place is gone."""

  def release(self) -> None:
    """Gives the right up; never raises."""


class FileLock:
  """A `WriterLock` of a local folder, which must exist."""

  def __init__(self, folder: pathlib.Path):
    """Raises: McjaxError, at once, if another writer holds it."""
    self._folder = folder
    self._path, self._owner = folder / LOCK_NAME, folder / OWNER_NAME
    self._process, self._me = os.getpid(), Owner.here()
    for name in (LOCK_NAME, OWNER_NAME):
      local_files.check(folder, name)
    # Not bound to a thread: it is released where the tree is closed.
    self._lock = filelock.FileLock(self._path, timeout=0, thread_local=False)
    try:
      self._lock.acquire()
    except filelock.Timeout:
      raise refusal(str(folder), self._read_owner()) from None
    except OSError as error:
      raise McjaxError(
        f"cannot open {folder} for writing ({error.strerror or error}):"
        ' mode="r" reads it'
      ) from error
    self._inode = -1
    try:
      self._inode = self._path.stat().st_ino
      self.crashed = self._read_owner()
      self._owner.write_text(self._me.dump(), encoding="utf-8")
    except OSError as error:
      self.release()
      with contextlib.suppress(OSError):
        self._path.unlink()
      raise McjaxError(f"could not write to {folder}: {error}") from error

  def _read_owner(self) -> Owner | None:
    local_files.check(self._folder, OWNER_NAME)
    with contextlib.suppress(OSError), self._owner.open("rb") as file:
      return Owner.parse(file.read(_OWNER_BYTES))
    return None

  def check(self) -> None:
    try:
      there = self._path.lstat().st_ino == self._inode
    except FileNotFoundError:
      there = self._lock_again()
    except OSError as error:
      raise McjaxError(f"cannot reach {self._folder}: {error}") from error
    if not there:
      raise McjaxError(
        f"{self._folder} was deleted or replaced while it was open for writing"
      )
    # Where a file system does not keep locks, this tells of another writer.
    if (owner := self._read_owner()) not in (None, self._me):
      raise McjaxError(
        f"{self._folder} is open for writing by {owner} too: open it again"
        " when that is done")

  def _lock_again(self) -> bool:
    """Locks a tree whose lock somebody deleted, unless there is another one.

    A commit that another writer made meanwhile shows in the record.
    """
    if not (self._folder / RECORD_KEY).exists():
      return False
    lock = filelock.FileLock(self._path, timeout=0, thread_local=False)
    try:
      lock.acquire()
      self._inode = self._path.stat().st_ino
    except (filelock.Timeout, OSError):
      return False
    self._lock.release()
    self._lock = lock
    return True

  def release(self) -> None:
    if os.getpid() != self._process:  # a fork's lock is still its parent's
      return
    with contextlib.suppress(OSError, McjaxError):
      self.check()  # else the owner there is another one
      self._owner.unlink()
    with contextlib.suppress(OSError):
      self._lock.release()


class MemoryLock:
  """A `WriterLock` of a tree that lives in this process only."""

  _held: weakref.WeakValueDictionary[str, MemoryLock] = (
    weakref.WeakValueDictionary()
  )
  crashed = None

  def __init__(self, url: str):
    """Raises: McjaxError if another tree object of the process holds it."""
    self._url, self._me = url, Owner.here()
    holder = self._held.setdefault(url, self)
    if holder is not self:
      raise refusal(url, holder._me)

  def check(self) -> None:
    pass

  def release(self) -> None:
    if self._held.get(self._url) is self:
      del self._held[self._url]


def acquire(store: Store) -> WriterLock:
  """The exclusive right to write a tree. Raises: McjaxError if it is taken."""
  if store.folder is not None:
    return FileLock(store.folder)
  if store.url.startswith("memory://"):
    return MemoryLock(store.url)
  return LeaseLock(store)
