"""Counts of a tree: how often a node was used, and a token occurs."""

from __future__ import annotations

from collections.abc import Callable
import zlib

import numpy as np

from mcjax.tree.store import Array, ArraySpec, Store, io_errors
from mcjax.types import McjaxError


class AccessCounts:
  """How often each node was used, summed in RAM and flushed after a commit.

  Counts are statistics: a crash loses those since the last flush.
  """

  SPEC = ArraySpec("uint32", 0, 1024, 2**13, dense=False)
  _LEVEL_SHIFT = 48
  _COMPACT_AT = 2**16

  def __init__(self, store: Store):
    self._store = store
    self._arrays: dict[int, Array] = {}
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

  def _array(self, level: int, create: bool) -> Array | None:
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


def frequency_spec(vocab_size: int) -> ArraySpec:
  """Layout of the counts of tokens: a row a slot."""
  return ArraySpec("uint32", vocab_size, 1, 1)


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
    self._spec = frequency_spec(vocab_size)
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
          " tools/check_tree --repair counts them again"
        )

  def add(self, blocks: np.ndarray) -> None:
    """Counts new blocks of token ids [n, 32]."""
    ids = np.sort(blocks, axis=1)
    first = np.ones(ids.shape, np.bool_)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    found, times = np.unique(ids[first], return_counts=True)
    self.counts[found] += times.astype(np.uint32)
    self.blocks += len(blocks)

  def save(self, always: bool = False) -> dict[str, int]:
    """What the commit record says of the counts, written if they are old."""
    if always or self.blocks - self._saved >= self.EVERY:
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
