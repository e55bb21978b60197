"""The commit record: reading it with its copy, and going on behind a crash."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
from typing import Any

from absl import logging

from mcjax.tree import format as tree_format
from mcjax.tree import lock as writer_lock
from mcjax.tree.store import (
  COPY_KEY,
  RECORD_KEY,
  Store,
  decode_record,
  encode_record,
)
from mcjax.types import McjaxError


def exists(store: Store) -> bool:
  """Whether a tree (whole or damaged) lies there."""
  return any(_is_there(store, key) for key in (COPY_KEY, RECORD_KEY))


def _is_there(store: Store, key: str) -> bool:
  try:
    return store.read_record(key)[0] is not None
  except McjaxError:
    if store.folder is not None and os.path.lexists(store.folder / key):
      return True  # a pipe, a folder: damaged
    raise


def read_commit(store: Store) -> tuple[dict[str, Any], bytes]:
  """The newest commit and its generation.

  Raises:
    McjaxError: there is none, it is damaged, or an older one was put back.
  """
  newest = _copied_commit(store)  # first: a writer may commit meanwhile
  raw, generation = store.read_record()
  if raw is None and newest:
    raise McjaxError(
      f"the commit record of {store.url} is missing: tools/check_tree --repair"
      " takes its copy"
    )
  if raw is None:
    raise McjaxError(f"there is no tree at {store.url}")
  record: dict[str, Any] = decode_record(raw, store.url)
  number = record.get("commit", 0)
  if isinstance(number, int) and number < newest:
    raise McjaxError(
      f"the commit record of {store.url} is an older one that was put back:"
      f" commit {number} of {newest}; tools/check_tree --repair takes its copy,"
      " which is the newest"
    )
  return record, generation


def _copied_commit(store: Store) -> int:
  """Number of the commit that the record's copy is of; 0 without one.

  Raises:
    McjaxError: the server that holds it, and so the record, does not answer.
  """
  try:
    raw, _ = store.read_record(COPY_KEY)
  except McjaxError:
    if store.folder is None:  # no file is in the way, but a server silent
      raise
    return 0
  with contextlib.suppress(McjaxError):  # it is the record that counts
    number = decode_record(raw, store.url).get("commit") if raw else 0
    return number if isinstance(number, int) else 0
  return 0


def check_unused(store: Store) -> bytes:
  """The generation of the record that is not there. Raises: McjaxError."""
  raw, generation = store.read_record()
  if raw is not None:
    raise McjaxError(f"{store.url} already holds a tree: open it instead")
  if not store.is_unused():
    raise McjaxError(f"{store.url} is not empty: give a new or empty folder")
  return generation


def recover(
  store: Store, lock: writer_lock.WriterLock, record: dict
) -> None:
  """Clears up behind a writer that was killed, and says so."""
  if lock.crashed is None:
    return
  count = store.remove_litter()
  logging.warning(
    "%s was not closed by %s: going on from its last commit, %d tokens;"
    " %d files of unfinished writes removed",
    store.url, lock.crashed, record["cursor"], count,
  )


class Head:
  """The newest commit of a tree that is being maintained, not appended to.

  Attributes:
    store: where it lies.
    record: of the commit.
  """

  def __init__(self, store: Store, record: dict, generation: bytes,
               lock: writer_lock.WriterLock):
    self.store, self.record, self._generation = store, record, generation
    self._lock = lock

  def write(self, record: dict) -> None:
    """Commits: the one moment at which the new state takes over.

    What only the old one used is deleted. Raises: McjaxError.
    """
    new = tree_format.without_past(record)
    new["commit"] = self.record.get("commit", 0) + 1
    new["version"] = tree_format.FORMAT_VERSION
    self._lock.check()
    self._generation = self.store.write_record(
      encode_record(new), self._generation)
    old, self.record = self.record, new
    folders = tree_format.epoch_folders
    for folder in folders(old) - folders(new):
      self.store.delete(folder + "/")


@contextlib.contextmanager
def maintaining(store: Store) -> Iterator[Head]:
  """Holds a tree for maintenance, exclusively.

  Raises:
    McjaxError: no tree, a damaged record, or open for writing elsewhere.
  """
  if not exists(store):
    raise McjaxError(f"there is no tree at {store.url}")
  lock = writer_lock.acquire(store)
  try:
    record, generation = read_commit(store)
    tree_format.check_readable(record, store.url)
    recover(store, lock, record)
    yield Head(store, record, generation, lock)
  finally:
    lock.release()
