"""Arrays of rows as the tree needs them: append-only, and counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import zlib

import numpy as np
import tensorstore as ts

from mcjax.tree.store import ArraySpec, Store, io_errors
from mcjax.types import McjaxError

_SUMS = ArraySpec("uint32", 0, 1024, 2**15)
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
  """

  def __init__(
    self,
    store: Store,
    path: str,
    spec: ArraySpec,
    length: int,
    sums: Mapping[str, int] | None = None,
  ):
    """Opens a column, or begins one of length 0.

    Args:
      store: where it lies.
      path: of its array.
      spec: of its rows.
      length: rows that are committed.
      sums: checksums of incomplete chunks by path, from the commit record;
        None where the tree has no checksums.
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
      self._sums = Column(store, f"{path}/sums", _SUMS, chunks, sums)
    self._pages: dict[int, np.ndarray] = {}

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
      out[: on_disk - start] = self._read_array(start, on_disk)
    at = self.flushed
    for part in self._tail:
      low, high = max(start, at), min(stop, at + len(part))
      if low < high:
        out[low - start : high - start] = part[low - at : high - at]
      at += len(part)
    return out

  def _read_array(self, start: int, stop: int) -> np.ndarray:
    """Flushed rows, checked. Raises: McjaxError."""
    assert self._array is not None
    chunk = self.spec.chunk
    low, high = start, stop
    if self._checked:
      low = start // chunk * chunk
      high = min(-(-stop // chunk) * chunk, self.flushed)
    with io_errors(f"read {self.path} of", self._store.url):
      rows = self._array[low:high].read().result()
    if self._checked:
      found, rest = _checksums(rows, chunk)
      expected = self._expected(low // chunk, low // chunk + len(found))
      if high % chunk:
        found, expected = [*found, rest], [*expected, self._crc]
      for at, (here, right) in enumerate(zip(found, expected, strict=True)):
        if here != right:
          at = low + at * chunk
          raise McjaxError(
            f"{self.path} of {self._store.url} is damaged: rows {at} to"
            f" {min(at + chunk, high)} are not those that were committed"
            " (checksum): restore the tree from a backup"
          )
    return rows[start - low : stop - low]

  def _expected(self, first: int, last: int) -> list[int]:
    """Checksums of complete chunks [first, last)."""
    out: list[int] = []
    while first < last:
      assert self._sums is not None
      page, at = divmod(first, _SUMS.chunk)
      stop = min(last - first + at, _SUMS.chunk)
      if len(self._pages.get(page, ())) < stop:
        begin = page * _SUMS.chunk
        end = min(begin + _SUMS.chunk, self._sums.length)
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
        self._store, f"{self.path}/sums", _SUMS, 0, {})
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
      with io_errors(f"read {self.path} of", self._store.url):
        rows = self._array[start : min(start + step, stop)].read().result()
      self._add_sums(rows)
      self.flushed = start + len(rows)

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
    if self._sums is not None:
      self._sums.restore(sums)


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


class AccessCounts:
  """How often each node was used, summed in RAM and flushed after a commit.

  Counts are statistics: a crash loses those since the last flush.
  """

  SPEC = ArraySpec("uint32", 0, 1024, 2**13, dense=False)
  _LEVEL_SHIFT = 48
  _COMPACT_AT = 2**16

  def __init__(self, store: Store):
    self._store = store
    self._arrays: dict[int, ts.TensorStore] = {}
    self._ids = np.zeros(0, np.int64)  # level << 48 | index, distinct, sorted
    self._times = np.zeros(0, np.int64)
    self._new: list[np.ndarray] = []

  def add(self, level: np.ndarray, index: np.ndarray) -> None:
    """Counts one access to each node; int [n] and int [n]."""
    self._new.append(
      (level.astype(np.int64) << self._LEVEL_SHIFT | index).ravel()
    )
    if sum(map(len, self._new)) >= self._COMPACT_AT or len(self._new) >= 256:
      self._compact()

  def _compact(self) -> None:
    if not self._new:
      return
    ids = np.concatenate([self._ids, *self._new])
    times = np.ones(len(ids), np.int64)
    times[: len(self._times)] = self._times
    self._ids, where = np.unique(ids, return_inverse=True)
    self._times = np.bincount(where, times, len(self._ids)).astype(np.int64)
    self._new = []

  def _array(self, level: int, create: bool) -> ts.TensorStore | None:
    path = f"access/L{level}"
    if level not in self._arrays:
      if not create and not self._store.has_array(path):
        return None
      self._arrays[level] = self._store.array(path, self.SPEC, create)
    return self._arrays[level]

  def _pending(self, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct indices and their times, of one level."""
    self._compact()
    low, high = np.searchsorted(
      self._ids, [level << self._LEVEL_SHIFT, level + 1 << self._LEVEL_SHIFT]
    )
    index = self._ids[low:high] & ((1 << self._LEVEL_SHIFT) - 1)
    return index, self._times[low:high]

  def read(self, level: int, start: int, stop: int) -> np.ndarray:
    """Counts of nodes [start, stop), flushed or not: uint32 [n]."""
    counts = np.zeros(stop - start, np.int64)
    array = self._array(level, create=False)
    if array is not None and stop > start:
      with io_errors("read access counts of", self._store.url):
        counts += array[start:stop].read().result()
    index, times = self._pending(level)
    low, high = np.searchsorted(index, [start, stop])
    counts[index[low:high] - start] += times[low:high]
    return np.minimum(counts, 2**32 - 1).astype(np.uint32)

  def flush(self, num_nodes: Callable[[int], int]) -> None:
    """Adds the pending counts of nodes below `num_nodes(level)` to the arrays.

    Raises:
      McjaxError: a failed write; the counts stay pending.
    """
    self._compact()
    for level in np.unique(self._ids >> self._LEVEL_SHIFT).tolist():
      index, times = self._pending(level)
      kept = index < num_nodes(level)
      index, times = index[kept], times[kept]
      if not len(index):
        continue
      array = self._array(level, create=True)
      assert array is not None
      with io_errors("write access counts of", self._store.url):
        counts = array[index].read().result() + times
        counts = np.minimum(counts, 2**32 - 1).astype(np.uint32)
        array[index].write(counts).result()
      low = level << self._LEVEL_SHIFT
      done = np.isin(self._ids, index | low)
      self._ids, self._times = self._ids[~done], self._times[~done]

  def snapshot(self) -> tuple[np.ndarray, np.ndarray]:
    """A state to `restore`."""
    self._compact()
    return self._ids, self._times

  def restore(self, state: tuple[np.ndarray, np.ndarray]) -> None:
    """Forgets the accesses since a snapshot."""
    self._ids, self._times = state
    self._new = []


class TokenFrequency:
  """How many complete blocks hold each token: the source of a query's idf.

  Written now and then into one of two slots, never the one that the commit
  record names; the blocks since are counted again when a tree opens.
  """

  EVERY = 2048  # blocks between two writes

  def __init__(self, store: Store, vocab_size: int, slot: int, blocks: int,
               crc: int | None = None):
    """Loads the counts of the first `blocks` blocks from a slot.

    Args:
      store: where they lie.
      vocab_size: counts.
      slot, blocks, crc: of the commit record; crc is missing in old ones.

    Raises:
      McjaxError: unreadable, or not those that were committed.
    """
    self._store = store
    self._spec = ArraySpec("uint32", vocab_size, 1, 1)
    self._slot, self._saved, self._crc = slot, blocks, crc
    self.blocks = blocks
    self.counts = np.zeros(vocab_size, np.uint32)
    if blocks:
      array = store.array("frequency", self._spec, create=False)
      with io_errors("read token frequencies of", store.url):
        self.counts[:] = array[slot].read().result()
      if crc is not None and crc != zlib.crc32(self.counts.data):
        raise McjaxError(
          f"the token frequencies of {store.url} are damaged (checksum):"
          " restore the tree from a backup"
        )

  def add(self, blocks: np.ndarray) -> None:
    """Counts new blocks of token ids [n, 32]."""
    ids = np.sort(blocks, axis=1)
    first = np.ones(ids.shape, np.bool_)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    found, times = np.unique(ids[first], return_counts=True)
    self.counts[found] += times.astype(np.uint32)
    self.blocks += len(blocks)

  def save(self) -> dict[str, int]:
    """What the commit record says of the counts, written if they are old."""
    if self.blocks - self._saved >= self.EVERY:
      slot = 1 - self._slot
      array = self._store.array("frequency", self._spec, create=True)
      with io_errors("write token frequencies of", self._store.url):
        array[slot].write(self.counts).result()
      crc = zlib.crc32(self.counts.data)
      return {"slot": slot, "blocks": self.blocks, "crc": crc}
    state = {"slot": self._slot, "blocks": self._saved}
    return state if self._crc is None else {**state, "crc": self._crc}

  def saved(self, state: dict[str, int]) -> None:
    """To be called once the record that holds `state` is written."""
    self._slot, self._saved = state["slot"], state["blocks"]
    self._crc = state.get("crc")

  def snapshot(self) -> tuple[int, np.ndarray]:
    """A state to `restore`."""
    return self.blocks, self.counts.copy()

  def restore(self, state: tuple[int, np.ndarray]) -> None:
    """Back to a snapshot."""
    self.blocks, self.counts = state[0], state[1].copy()
