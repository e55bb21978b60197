"""Of a tree on the local disk only folders and plain files are touched.

A symlink could lead out of the tree, and a pipe or a device never ends. So
every part of a path below the tree's folder is looked at before what lies there
is read, written or deleted. The folder itself may be reached through a symlink.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import os
import pathlib
import stat
from typing import Any

import numpy as np
import tensorstore as ts

from mcjax.types import McjaxError

_KIND = 0o170000  # of a mode
_KINDS = {
  stat.S_IFLNK: "a symlink", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}


def check(folder: pathlib.Path, key: str) -> None:
  """Raises McjaxError if a part of a key is no folder and no plain file.

  Args:
    folder: of the tree.
    key: below it; parts that do not exist are fine.
  """
  place = str(folder)
  for part in key.split("/"):
    if part:
      place = f"{place}/{part}"
      if not _check_one(place):
        return


def _check_one(place: str) -> bool:
  """Whether something is there. Raises: McjaxError if it is not plain."""
  try:
    kind = os.lstat(place).st_mode & _KIND
  except (FileNotFoundError, NotADirectoryError):
    return False
  except (OSError, ValueError) as error:
    raise McjaxError(f"cannot reach {place}: {error}") from error
  if kind in _KINDS:
    raise McjaxError(f"{place} is {_KINDS[kind]}, not a plain file of the tree")
  return True


def strange(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """(key, what it is) of everything that is no folder and no plain file."""
  for path, folders, files in os.walk(folder):
    for name in (*folders, *files):
      place = os.path.join(path, name)
      try:
        _check_one(place)
      except McjaxError as error:
        yield os.path.relpath(place, folder), str(error)


class PlainFiles:
  """A TensorStore array, of which only plain files are read and written."""

  def __init__(self, array: ts.TensorStore, folder: pathlib.Path, path: str,
               shard: int):
    """Args: folder: of the tree; path: of the array; shard: rows a file."""
    self._array, self._shard, self._wide = array, shard, array.ndim > 1
    parts = pathlib.PurePath(path, "c").parts
    self._above = [
      str(folder.joinpath(*parts[: n + 1])) for n in range(len(parts))]

  def __getitem__(self, where: Any) -> ts.TensorStore:
    """Rows to read or to write. Raises: McjaxError."""
    for place in self._above:
      _check_one(place)
    for number in self._shards(where):
      place = f"{self._above[-1]}/{number}"
      if _check_one(place) and self._wide:
        _check_one(f"{place}/0")
    return self._array[where]

  def _shards(self, where: Any) -> Iterable[int]:
    """Numbers of the files in which the rows lie."""
    if isinstance(where, slice):
      last = max(where.start, where.stop - 1)
      return range(where.start // self._shard, last // self._shard + 1)
    return np.unique(np.asarray(where) // self._shard).tolist()
