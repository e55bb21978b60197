"""Arrays of rows as the tree needs them: append-only, and counters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorstore as ts

from mcjax.tree.store import ArraySpec, Store, io_errors


class Column:
  """An append-only array of rows whose newest rows may still be in RAM.

  Rows [0, flushed) are in the array, rows [flushed, length) in RAM. Full shards
  go to the array as soon as they are complete, so RAM holds less than one
  shard plus the newest append.
  """

  def __init__(self, store: Store, path: str, spec: ArraySpec, length: int):
    self.spec, self.path = spec, path
    self.length = self.flushed = length
    self._store = store
    self._array = store.array(path, spec, create=False) if length else None
    self._tail: list[np.ndarray] = []

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
      with io_errors(f"read {self.path} of", self._store.url):
        out[: on_disk - start] = self._array[start:on_disk].read().result()
    at = self.flushed
    for part in self._tail:
      low, high = max(start, at), min(stop, at + len(part))
      if low < high:
        out[low - start : high - start] = part[low - at : high - at]
      at += len(part)
    return out

  def start_flush(self, everything: bool) -> ts.WriteFutures | None:
    """Begins to write the tail; `finish_flush` must follow.

    Args:
      everything: also the rows of the last, incomplete shard.

    Returns:
      The pending write, or None if there is nothing to write.
    """
    stop = self.length
    if not everything:
      stop -= stop % self.spec.shard
    if stop <= self.flushed:
      return None
    if self._array is None:
      self._array = self._store.array(self.path, self.spec, create=True)
    rows = self.read(self.flushed, stop)
    return self._array[self.flushed : stop].write(rows)

  def finish_flush(self, everything: bool) -> None:
    """Drops the rows from RAM that `start_flush` has written."""
    stop = self.length
    if not everything:
      stop -= stop % self.spec.shard
    if stop > self.flushed:
      kept = self.read(stop, self.length)
      self._tail = [kept] if len(kept) else []
      self.flushed = stop

  def snapshot(self) -> tuple[int, int, list[np.ndarray]]:
    """A state to `restore`; costs no copy of rows."""
    return self.length, self.flushed, list(self._tail)

  def restore(self, state: tuple[int, int, list[np.ndarray]]) -> None:
    """Back to a snapshot; rows written since become invisible."""
    self.length, self.flushed, self._tail = state[0], state[1], list(state[2])


def flush_columns(columns: list[Column], url: str, *, everything: bool) -> None:
  """Writes the tails of many columns at once. Raises: McjaxError.

  After a failure no column has changed: what did reach the arrays lies beyond
  their flushed length and will be overwritten.
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

  def __init__(self, store: Store, vocab_size: int, slot: int, blocks: int):
    """Loads the counts of the first `blocks` blocks from a slot."""
    self._store = store
    self._spec = ArraySpec("uint32", vocab_size, 1, 1)
    self._slot, self._saved = slot, blocks
    self.blocks = blocks
    self.counts = np.zeros(vocab_size, np.uint32)
    if blocks:
      array = store.array("frequency", self._spec, create=False)
      with io_errors("read token frequencies of", store.url):
        self.counts[:] = array[slot].read().result()

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
      return {"slot": slot, "blocks": self.blocks}
    return {"slot": self._slot, "blocks": self._saved}

  def saved(self, state: dict[str, int]) -> None:
    """To be called once the record that holds `state` is written."""
    self._slot, self._saved = state["slot"], state["blocks"]

  def snapshot(self) -> tuple[int, np.ndarray]:
    """A state to `restore`."""
    return self.blocks, self.counts.copy()

  def restore(self, state: tuple[int, np.ndarray]) -> None:
    """Back to a snapshot."""
    self.blocks, self.counts = state[0], state[1].copy()
