"""Append-only arrays of rows, with checksums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import zlib

import numpy as np
import tensorstore as ts

from mcjax.tree import format as tree_format
from mcjax.tree.store import Array, ArraySpec, Store, decode_record, io_errors
from mcjax.types import McjaxError

SUMS = ArraySpec("uint32", 0, 1024, 2**15)
_PAGES = 64  # chunks of checksums kept in RAM, per column


class Column:
  """An append-only array of rows whose newest rows may still be in RAM.

  Rows [0, flushed) are in the array, rows [flushed, length) in RAM. Full shards
  go to the array as soon as they are complete, so RAM holds less than one
  shard plus the newest append.

  What is read back is held against checksums: one of each complete chunk, in a
  column of their own (which has checksums in its turn, a thousandth as many),
  and one of the incomplete chunk, in the commit record. So a chunk that is
  damaged, stale, or another one's is found when it is read.

  Compaction moves the oldest rows into an array of larger files, PATH/packed;
  the rows and their checksums stay what they are.
  """

  def __init__(
    self,
    store: Store,
    path: str,
    spec: ArraySpec,
    length: int,
    sums: Mapping[str, int] | None = None,
    packed: Mapping[str, Sequence[int]] | None = None,
    recent: int = 0,
  ):
    """Opens a column, or begins one of length 0.

    Args:
      store: where it lies.
      path: of its array.
      spec: of its rows.
      length: rows that are committed.
      sums: checksums of incomplete chunks by path, from the commit record;
        None where the tree has no checksums.
      packed: rows that are packed, and rows a file, by path, from the record.
      recent: chunks that stay in RAM once they were read.
    """
    self.spec, self.path = spec, path
    self.length = self.flushed = length
    self._store = store
    self._array = store.array(path, spec, create=False) if length else None
    self._tail: list[np.ndarray] = []
    self._checked = sums is not None
    self._crc = (sums or {}).get(path, 0)  # of the flushed incomplete chunk
    self._sums: Column | None = None
    if self._checked and (chunks := length // spec.chunk):
      self._sums = Column(store, f"{path}/sums", SUMS, chunks, sums)
    self._pages: dict[int, np.ndarray] = {}
    self._recent = functools.lru_cache(recent)(self._read_chunk)
    self._keeps_recent = recent > 0
    self.packed = 0
    self._packed_array: Array | None = None
    if packed and path in packed:
      self.use_packed(*packed[path])

  def use_packed(self, rows: int, shard: int) -> None:
    """Reads the first `rows` rows from the packed array from now on."""
    self._packed_array = self.packed_array(shard, create=False)
    self.packed = rows

  def packed_array(self, shard: int, create: bool) -> Array:
    """The array of packed rows, so many of them a file. Raises: McjaxError."""
    spec = self.spec._replace(shard=shard)
    return self._store.array(f"{self.path}/packed", spec, create)

  def append(self, rows: np.ndarray) -> None:
    """Adds a copy of rows [n, *row_shape] in RAM."""
    if not len(rows):
      return
    part = np.array(rows, self.spec.numpy_dtype, order="C")
    self.length += len(part)
    while self._tail and len(self._tail[-1]) <= len(part):  # O(log) parts
      part = np.concatenate([self._tail.pop(), part])
    self._tail.append(part)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) as [stop - start, *row_shape]. Raises: McjaxError."""
    if not 0 <= start <= stop <= self.length:
      raise IndexError(f"rows {start}:{stop} of {self.length} in {self.path}")
    out = np.empty((stop - start, *self.spec.row_shape), self.spec.numpy_dtype)
    on_disk = min(stop, self.flushed)
    if start < on_disk and self._array is not None:
      out[: on_disk - start] = self._read_flushed(start, on_disk)
    at = self.flushed
    for part in self._tail:
      low, high = max(start, at), min(stop, at + len(part))
      if low < high:
        out[low - start : high - start] = part[low - at : high - at]
      at += len(part)
    return out

  def _read_flushed(self, start: int, stop: int) -> np.ndarray:
    """Flushed rows; a few of complete chunks come from RAM. Raises: McjaxError.
    """
    chunk = self.spec.chunk
    complete = self.flushed // chunk * chunk
    if not self._keeps_recent or stop > complete or stop - start > chunk:
      return self._read_array(start, stop)
    first = start // chunk
    parts = [self._recent(at) for at in range(first, -(-stop // chunk))]
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return rows[start - first * chunk : stop - first * chunk]

  def _read_chunk(self, at: int) -> np.ndarray:
    """A complete chunk, which never changes. Raises: McjaxError."""
    chunk = self.spec.chunk
    return self._read_array(at * chunk, (at + 1) * chunk)

  def _read_array(self, start: int, stop: int) -> np.ndarray:
    """Flushed rows, checked. Raises: McjaxError."""
    assert self._array is not None
    chunk = self.spec.chunk
    low, high = start, stop
    if self._checked:
      low = start // chunk * chunk
      high = min(-(-stop // chunk) * chunk, self.flushed)
    rows = self._read_stored(low, high)
    for at, fine in enumerate(self.vouches(low, rows) if self._checked else ()):
      if not fine:
        at = low + at * chunk
        raise McjaxError(
          f"{self.path} of {self._store.url} is damaged: rows {at} to"
          f" {min(at + chunk, high)} are not those that were committed"
          " (checksum): tools/check_tree tells what is lost, --repair what"
          " can be made anew"
        )
    return rows[start - low : stop - low]

  def vouches(self, low: int, rows: np.ndarray) -> list[bool]:
    """For each chunk of rows from `low` on, if it is the one committed.

    Args:
      low: at a chunk's edge.
      rows: whole chunks, or up to the last flushed row.

    Raises:
      McjaxError: the checksums cannot be read.
    """
    chunk = self.spec.chunk
    found, rest = _checksums(rows, chunk)
    expected = self._expected(low // chunk, low // chunk + len(found))
    if len(rows) % chunk:
      found, expected = [*found, rest], [*expected, self._crc]
    return [a == b for a, b in zip(found, expected, strict=True)]

  def stored_sums(self) -> tuple[np.ndarray, np.ndarray]:
    """Checksums of the complete chunks, of the rows as they lie there now.

    Returns:
      uint32 [chunks], and bool [chunks] where the rows can be read.
    """
    chunk = self.spec.chunk
    sums = np.zeros(self.flushed // chunk, np.uint32)
    known = np.zeros(len(sums), np.bool_)
    for at in range(len(sums)):
      with contextlib.suppress(McjaxError):
        rows = self._read_stored(at * chunk, (at + 1) * chunk)
        sums[at], known[at] = _checksums(rows, chunk)[0][0], True
    return sums, known

  def _read_stored(self, low: int, high: int) -> np.ndarray:
    """Flushed rows, packed or not, as the arrays have them."""
    try:
      return self._read_arrays(low, high)
    except McjaxError:
      if not self._has_moved():
        raise
    return self._read_arrays(low, high)

  def _read_arrays(self, low: int, high: int) -> np.ndarray:
    assert self._array is not None
    edge = min(max(low, self.packed), high)
    with io_errors(f"read {self.path} of", self._store.url):
      parts = []
      if low < edge:
        assert self._packed_array is not None
        parts.append(self._packed_array[low:edge].read())
      if edge < high or not parts:
        parts.append(self._array[edge:high].read())
      rows = [part.result() for part in parts]
      return rows[0] if len(rows) == 1 else np.concatenate(rows)

  def _has_moved(self) -> bool:
    """Follows a compaction since this column was opened, if there was one.

    Raises:
      McjaxError: the column is not in use any more.
    """
    record = None
    with contextlib.suppress(McjaxError):
      raw, _ = self._store.read_record()
      record = decode_record(raw, self._store.url) if raw else None
    if record is None or "gist_epoch" not in record:
      return False
    if not tree_format.is_current(self.path, record):
      raise McjaxError(
        f"{self._store.url} was written anew since it was opened: refresh it,"
        " or open it again"
      )
    rows, shard = record.get("packed", {}).get(self.path, (0, 0))
    if rows <= self.packed:
      return False
    self.use_packed(rows, shard)
    return True

  def _expected(self, first: int, last: int) -> list[int]:
    """Checksums of complete chunks [first, last)."""
    out: list[int] = []
    while first < last:
      assert self._sums is not None
      page, at = divmod(first, SUMS.chunk)
      stop = min(last - first + at, SUMS.chunk)
      if len(self._pages.get(page, ())) < stop:
        begin = page * SUMS.chunk
        end = min(begin + SUMS.chunk, self._sums.length)
        while len(self._pages) >= _PAGES:
          self._pages.pop(next(iter(self._pages)))
        self._pages[page] = self._sums.read(begin, end)
      out += self._pages[page][at:stop].tolist()
      first += stop - at
    return out

  def start_flush(self, everything: bool) -> ts.WriteFutures | None:
    """Begins to write the tail; `finish_flush` must follow.

    Args:
      everything: also the rows of the last, incomplete shard.

    Returns:
      The pending write, or None if there is nothing to write.
    """
    stop = self._flushable(everything)
    if stop <= self.flushed:
      return None
    if self._array is None:
      self._array = self._store.array(self.path, self.spec, create=True)
    rows = self.read(self.flushed, stop)
    return self._array[self.flushed : stop].write(rows)

  def _flushable(self, everything: bool) -> int:
    shard = 1 if everything else self.spec.shard
    return self.length // shard * shard

  def finish_flush(self, everything: bool) -> None:
    """Drops the rows from RAM that `start_flush` has written."""
    stop = self._flushable(everything)
    if stop > self.flushed:
      if self._checked:
        self._add_sums(self.read(self.flushed, stop))
      kept = self.read(stop, self.length)
      self._tail = [kept] if len(kept) else []
      self.flushed = stop

  def _add_sums(self, rows: np.ndarray) -> None:
    """Takes up the checksums of rows behind those flushed."""
    filled = self.flushed % self.spec.chunk
    sums, self._crc = _checksums(rows, self.spec.chunk, filled, self._crc)
    if sums and self._sums is None:
      self._sums = Column(
        self._store, f"{self.path}/sums", SUMS, 0, {})
    if self._sums is not None:
      self._sums.append(np.array(sums, np.uint32))

  def begin_sums(self) -> None:
    """Makes the checksums of a column that has none; reads it once."""
    if self._checked:
      return
    self._checked, stop, self.flushed = True, self.flushed, 0
    step = max(self.spec.shard, self.spec.chunk)
    for start in range(0, stop, step):
      assert self._array is not None
      rows = self._read_stored(start, min(start + step, stop))
      self._add_sums(rows)
      self.flushed = start + len(rows)

  def damage(self) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of chunks that are not those committed."""
    step = max(self.spec.shard, self.spec.chunk)
    for start in range(0, self.flushed, step):
      stop = min(start + step, self.flushed)
      if not self._reads_well(start, stop):
        yield from self._bad_chunks(start, stop)

  def _reads_well(self, start: int, stop: int) -> bool:
    try:
      self._read_array(start, stop)
    except McjaxError:
      return False
    return True

  def _bad_chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, self.spec.chunk):
      high = min(low + self.spec.chunk, stop)
      if not self._reads_well(low, high):
        yield low, high

  @property
  def sums(self) -> Column | None:
    """The column of its checksums, where there is one."""
    return self._sums

  def record_sums(self) -> dict[str, int]:
    """What the commit record says of it; valid when all is flushed."""
    if not self._checked:
      return {}
    deeper = self._sums.record_sums() if self._sums is not None else {}
    return {self.path: self._crc, **deeper}

  def snapshot(self) -> tuple:
    """A state to `restore`; costs no copy of rows."""
    sums = None if self._sums is None else self._sums.snapshot()
    return (self.length, self.flushed, list(self._tail), self._crc,
            self._sums, sums, self._checked)

  def restore(self, state: tuple) -> None:
    """Back to a snapshot; rows written since become invisible."""
    (self.length, self.flushed, tail, self._crc, self._sums, sums,
     self._checked) = state
    self._tail, self._pages = list(tail), {}
    self._recent.cache_clear()
    if self._sums is not None:
      self._sums.restore(sums)


def checksum(rows: np.ndarray) -> int:
  """CRC-32 of a whole chunk."""
  return _checksums(rows, len(rows))[0][0]


def _checksums(
  rows: np.ndarray, chunk: int, filled: int = 0, crc: int = 0
) -> tuple[list[int], int]:
  """CRC-32 of every chunk that rows complete, and of the rest.

  Args:
    rows: what follows the first `filled` rows of a chunk.
    chunk: rows of a chunk.
    filled: rows that `crc` is of.
    crc: of those.
  """
  sums: list[int] = []
  at = 0
  while at < len(rows):
    part = np.ascontiguousarray(rows[at : at + chunk - filled])
    crc = zlib.crc32(part.view(np.uint8).reshape(-1).data, crc)
    filled, at = filled + len(part), at + len(part)
    if filled == chunk:
      sums.append(crc)
      filled = crc = 0
  return sums, crc


def flush_columns(columns: list[Column], url: str, *, everything: bool) -> None:
  """Writes the tails of many columns at once. Raises: McjaxError.

  After a failure every column holds what it held: what did reach the arrays
  lies beyond their flushed length and will be overwritten.
  """
  with io_errors("write to", url):
    pending: list[ts.WriteFutures] = []
    try:
      for column in columns:
        future = column.start_flush(everything)
        if future is not None:
          pending.append(future)
    finally:
      failures = [failure for f in pending if (failure := f.exception())]
    if failures:
      raise failures[0]
  for column in columns:
    column.finish_flush(everything)
  sums = [column.sums for column in columns if column.sums is not None]
  if sums:
    flush_columns(sums, url, everything=everything)
