"""TensorStore arrays and one atomic commit record under a single url.

A store is a folder of a key-value store (a path, `file://`, `memory://`,
`gs://` or `s3://`). It holds zarr3 arrays of rows, sharded so that a small
append rewrites at most one shard per array, and one JSON record. The record is
replaced in a single atomic write after every array write has finished, and it
says how many rows count: a reader, or a process that comes back after a crash,
sees all of an append or nothing of it. Rows beyond the committed length are
invisible and are overwritten by the next append.

Arrays are declared 2**46 rows long and never resized, so an append touches no
array metadata.

Only one writer is let in at a time (`lock`), so TensorStore's own lock files
are off: one that a killed process leaves behind would be written over, not
truncated, by the next write of its key. Without them each write goes through a
new file of its own, and what a killed process leaves is litter.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
from typing import Any, NamedTuple
import zlib

from absl import logging
import numpy as np
import tensorstore as ts

from mcjax.tree import local_files
from mcjax.tree.places import RETRIES, limit_time, locate
from mcjax.types import McjaxError

MAX_ROWS = 2**46
RECORD_KEY = "mcjax_tree.json"
COPY_KEY = "mcjax_tree.copy.json"  # of the record, written after it
_RECORD_BYTES = 64 << 20  # no record is larger
_OURS = "mcjax_tree."  # what an interrupted creation leaves starts with this
_LITTER = ".__lock"  # what a killed write leaves ends with this
CACHE_BYTES = 64 << 20  # decoded chunks kept in RAM, per process


def shared_context() -> ts.Context:
  """The process's one TensorStore context; `memory://` lives inside it.

  Raises:
    McjaxError: the process was forked from one that has it. TensorStore's
      threads are not in it, so it would wait for ever.
  """
  context, process = _made_context()
  if process != os.getpid():
    raise McjaxError(
      f"process {os.getpid()} was forked from one that has used stored trees,"
      ' which cannot work: start it anew (multiprocessing: "spawn")')
  return context


@functools.cache
def _made_context() -> tuple[ts.Context, int]:
  """The context, and the process that made it."""
  limit_time()
  context = ts.Context({
    **RETRIES,
    "cache_pool": {"total_bytes_limit": CACHE_BYTES},
    "file_io_locking": {"mode": "none"},
  })
  return context, os.getpid()


@contextlib.contextmanager
def io_errors(what: str, url: str) -> Iterator[None]:
  """Turns a storage failure into a one-line `McjaxError`."""
  try:
    yield
  except McjaxError:
    raise
  except (ValueError, OSError, RuntimeError, IndexError) as error:
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    reason = re.sub(r"\s*\[(source locations|tensorstore_spec)=.*", "", reason)
    raise McjaxError(f"could not {what} {url}: {reason[:300]}") from error


class ArraySpec(NamedTuple):
  """How one array is laid out.

  Attributes:
    dtype: zarr3 data type name.
    width: elements per row; 0 makes the rows scalars.
    chunk: rows per compressed chunk, the smallest read.
    shard: rows per file, the smallest write; a multiple of `chunk`.
    compress: zstd level 1 after the bytes codec.
    dense: every row up to the length is written; a missing one is an error.
  """

  dtype: str
  width: int
  chunk: int
  shard: int
  compress: bool = True
  dense: bool = True

  @property
  def numpy_dtype(self) -> np.dtype:
    return np.dtype(ts.dtype(self.dtype).numpy_dtype)

  @property
  def row_shape(self) -> tuple[int, ...]:
    return (self.width,) if self.width else ()


Array = ts.TensorStore | local_files.PlainFiles


class Store:
  """A folder of rows arrays and one record.

  Attributes:
    url: where it lies.
    folder: the same, of local files; else None.
    kv: the key-value store under it.
  """

  def __init__(self, url: str | os.PathLike[str]):
    """Args: url: a path or a kvstore url. Raises: McjaxError."""
    place = locate(url)
    self.url, self.folder = place.url, place.folder
    with io_errors("reach", self.url):
      self.kv = ts.KvStore.open(place.spec, context=shared_context()).result()

  # The record.

  def read_record(self, key: str = RECORD_KEY) -> tuple[bytes | None, bytes]:
    """The raw record (None where there is none) and its generation.

    Args:
      key: the record, or `COPY_KEY`.
    """
    with io_errors("read", self.url):
      if self.folder is not None:
        local_files.check(self.folder, key)
        path = self.folder / key
        if path.exists() and not path.is_file():
          raise McjaxError(f"{path} is not a file")
        if path.exists() and path.stat().st_size > _RECORD_BYTES:
          raise McjaxError(f"{path} is too large for a commit record")
      found = self.kv.read(key).result()
    value = bytes(found.value) if found.state == "value" else None
    return value, found.stamp.generation

  def write_record(self, value: bytes, generation: bytes) -> bytes:
    """Replaces the record atomically, then its copy.

    The copy tells a record that is put back from an older backup, and mends one
    that is damaged. A commit does not fail for its sake.

    Args:
      value: the new record.
      generation: what the last read or write of the record returned.

    Returns:
      The new generation.

    Raises:
      McjaxError: the record is no longer that generation, or I/O failed.
    """
    with io_errors("write", self.url):
      self.check_plain(RECORD_KEY)
      stamp = self.kv.write(RECORD_KEY, value, if_equal=generation).result()
    if not stamp.generation:
      raise McjaxError(
        f"another process wrote {self.url} meanwhile: close this tree and open"
        " it again"
      )
    try:
      self.write_copy(value)
    except McjaxError as error:
      logging.log_first_n(logging.WARNING, "%s", 1, error)
    return stamp.generation

  def write_copy(self, value: bytes) -> None:
    """Replaces the copy of the record. Raises: McjaxError."""
    with io_errors("write", self.url):
      self.check_plain(COPY_KEY)
      self.kv.write(COPY_KEY, value).result()

  # Arrays and keys.

  def check_plain(self, key: str) -> None:
    """Raises McjaxError where a symlink, a pipe or a device is in the way."""
    if self.folder is not None:
      local_files.check(self.folder, key)

  def array(self, path: str, spec: ArraySpec, create: bool) -> Array:
    """Opens one array, creating it if asked to. Raises: McjaxError."""
    self.check_plain(f"{path}/zarr.json")
    inner: list[dict[str, Any]] = [
      {"name": "bytes", "configuration": {"endian": "little"}}]
    if spec.dtype in ("uint8", "int8"):
      inner = [{"name": "bytes"}]
    if spec.compress:
      inner.append({"name": "zstd", "configuration": {"level": 1}})
    inner.append({"name": "crc32c"})
    row = list(spec.row_shape)
    index = [
      {"name": "bytes", "configuration": {"endian": "little"}},
      {"name": "crc32c"},
    ]
    sharding = {
      "chunk_shape": [spec.chunk, *row],
      "codecs": inner,
      "index_codecs": index,
    }
    grid = {"chunk_shape": [spec.shard, *row]}
    metadata = {
      "shape": [MAX_ROWS, *row],
      "data_type": spec.dtype,
      "chunk_grid": {"name": "regular", "configuration": grid},
      "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    with io_errors("open an array of", self.url):
      array = ts.open(
        {
          "driver": "zarr3",
          "kvstore": (self.kv / (path + "/")).spec().to_json(),
          "metadata": metadata,
          "recheck_cached_data": "open",
          "recheck_cached_metadata": "open",
          "fill_missing_data_reads": not spec.dense,
          "store_data_equal_to_fill_value": spec.dense,
        },
        open=True,
        create=create,
        context=shared_context(),
      ).result()
    if self.folder is None:
      return array
    return local_files.PlainFiles(array, self.folder, path, spec.shard)

  def has_array(self, path: str) -> bool:
    """Whether an array was ever made there."""
    self.check_plain(f"{path}/zarr.json")
    with io_errors("read", self.url):
      return self.kv.read(path + "/zarr.json").result().state == "value"

  def is_unused(self) -> bool:
    """Whether nothing lies under the url but traces of a failed creation."""
    if self.folder is None:
      names = self.keys()
    else:
      with io_errors("read", self.url):
        names = [p.name for p in self.folder.iterdir()] if (
          self.folder.exists()) else []
    return all(name.startswith(_OURS) for name in names)

  def keys(self) -> list[str]:
    """Every key, of whatever kind."""
    with io_errors("list", self.url):
      return [key.decode() for key in self.kv.list().result()]

  def sizes(self) -> dict[str, int]:
    """Bytes stored under each key; off the local disk this reads them all."""
    if self.folder is not None:
      for _, what in local_files.strange(self.folder):
        raise McjaxError(what)
      found = (p for p in self.folder.rglob("*") if p.is_file())
      return {
        p.relative_to(self.folder).as_posix(): p.stat().st_size for p in found
      }
    with io_errors("read", self.url):
      return {
        key: len(self.kv.read(key).result().value) for key in self.keys()
      }

  def delete(self, prefix: str) -> None:
    """Deletes every key that starts with `prefix` (a folder path with /)."""
    self.check_plain(prefix.rpartition("/")[0])
    with io_errors("delete from", self.url):
      (self.kv / prefix).delete_range(ts.KvStore.KeyRange()).result()
    if self.folder is not None and prefix.endswith("/"):
      shutil.rmtree(self.folder / prefix, ignore_errors=True)

  def delete_shards(self, path: str, below: int) -> int:
    """Deletes the first files of an array. Raises: McjaxError.

    Args:
      path: of the array.
      below: number of the first file that stays.

    Returns:
      How many were deleted.
    """
    self.check_plain(f"{path}/c")
    with io_errors("delete from", self.url):
      chunks = self.kv / f"{path}/c/"
      keys = [key.decode() for key in chunks.list().result()]
      gone = [key for key in keys if int(key.split("/")[0]) < below]
      for pending in [chunks.write(key, None) for key in gone]:
        pending.result()
    if self.folder is not None:
      for key in gone:
        with contextlib.suppress(OSError):
          (self.folder / path / "c" / key).parent.rmdir()
    return len(gone)

  def make_folder(self) -> list[pathlib.Path]:
    """Makes the local folder. Returns: those that are new, outermost last."""
    if self.folder is None:
      return []
    chain = (self.folder, *self.folder.parents)
    with io_errors("create", self.url):
      made = [p for p in chain if not p.exists()]
      self.folder.mkdir(parents=True, exist_ok=True)
    return made

  def unmake(self, made: list[pathlib.Path], locked: bool) -> None:
    """Undoes a creation that wrote no record.

    Args:
      made: of `make_folder`.
      locked: what lies there is ours; else only empty folders go.
    """
    with contextlib.suppress(ValueError, OSError, McjaxError):
      if locked and self.read_record()[0] is None:
        self.delete(_OURS)
      for folder in made:
        folder.rmdir()

  def remove_litter(self) -> int:
    """Deletes what killed writes left of files; the number of them."""
    if self.folder is None:
      return 0
    found = list(self.folder.rglob("*" + _LITTER))
    for path in found:
      with contextlib.suppress(OSError):
        path.unlink()
    return len(found)


def encode_record(fields: dict[str, object]) -> bytes:
  """JSON with a checksum of everything else in it."""
  body = json.dumps(fields, sort_keys=True, separators=(",", ":"))
  return json.dumps(
    {**fields, "crc32": zlib.crc32(body.encode())}, sort_keys=True, indent=1
  ).encode()


def decode_record(raw: bytes, url: str) -> dict[str, Any]:
  """Inverse of `encode_record`. Raises: McjaxError if it is damaged."""
  try:
    fields = json.loads(raw)
    checksum = fields.pop("crc32")
    body = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    if zlib.crc32(body.encode()) != checksum:
      raise ValueError("checksum mismatch")
  except (
    ValueError, KeyError, AttributeError, TypeError, RecursionError
  ) as error:
    raise McjaxError(
      f"the commit record of {url} is damaged ({error}): tools/check_tree"
      " --repair takes its copy"
    ) from error
  return fields
