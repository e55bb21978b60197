"""A tiny encoder, and a plain NumPy tree to compare the stored one with."""

from typing import Any
import weakref

import numpy as np

from mcjax.tree import format as tree_format
from mcjax.tree import lexical_keys as keys
from mcjax.tree.store import Store, io_errors
from mcjax.tree.tree import MegaContextTree

VOCAB = 300
BASE: dict[str, Any] = {"base_fingerprint": "base-1", "base_name": "tiny"}


class TinyEncoder:
  """A fixed random projection; same rows whatever the batch."""

  def __init__(self, d_model=8, seed=0, fingerprint=None):
    self.d_model = d_model
    self.fingerprint = fingerprint or f"tiny-{seed}"
    self.calls = []
    rng = np.random.default_rng(seed)
    self._table = rng.standard_normal((2**16, d_model)).astype(np.float32)
    self._mix = rng.standard_normal((32, d_model)).astype(np.float32)

  def encode_tokens(self, token_ids):
    assert token_ids.dtype == np.int32 and token_ids.shape[1:] == (32,)
    self.calls.append((1, len(token_ids)))
    return (self._table[token_ids] * self._mix).sum(axis=1)

  def encode_gists(self, gists, level):
    assert gists.dtype == np.float32
    assert gists.shape[1:] == (32, self.d_model)
    self.calls.append((level, len(gists)))
    return np.tanh((gists * self._mix).sum(axis=1)) + np.float32(level)


class TinyKeyer:
  """Keys in -spread..spread out of tokens and gists, whatever the batch."""

  def __init__(self, key_dim=4, seed=0, spread=127):
    self.key_dim, self.spread = key_dim, spread
    self.fingerprint = f"lens-{seed}"
    rng = np.random.default_rng(seed)
    self._table = rng.integers(0, 10**6, (2**16, key_dim))

  def encode_keys(self, token_ids, gists):
    assert token_ids.dtype == np.int32 and token_ids.shape[1:] == (32,)
    assert gists.dtype == np.float32 and len(gists) == len(token_ids)
    mixed = self._table[token_ids].sum(axis=1)
    mixed += np.rint(1000 * gists[:, :1]).astype(np.int64)
    return (mixed % (2 * self.spread + 1) - self.spread).astype(np.int8)


def reference_gists(encoder, ids, pack):
  """Gists per level of a history; `pack` rounds as the store does."""
  levels = []
  n = len(ids) // 32
  rows = pack(encoder.encode_tokens(ids[: n * 32].reshape(n, 32)))
  while n:
    levels.append(rows)
    n //= 32
    children = rows[: n * 32].reshape(n, 32, encoder.d_model)
    rows = pack(encoder.encode_gists(children, len(levels) + 1))
  return levels


def random_ids(n, seed=0, vocab=VOCAB):
  """Zipf-distributed token ids, int32 [n]."""
  rng = np.random.default_rng(seed)
  return (rng.zipf(1.3, n) % vocab).astype(np.int32)


_WRITERS = weakref.WeakValueDictionary()  # url -> the tree last opened there


def create(url, encoder=None, **kwargs):
  kwargs = BASE | {"vocab_size": VOCAB} | kwargs
  tree = MegaContextTree.create(url, encoder=encoder or TinyEncoder(), **kwargs)
  _WRITERS[str(url)] = tree
  return tree


def reopen(url, encoder=None, **kwargs):
  """Opens for writing, as a new process after the old one was killed."""
  if (old := _WRITERS.pop(str(url), None)) is not None:
    assert old._lock is not None
    old._lock.release()  # as the kernel does; nothing is flushed
  tree = MegaContextTree.open(
    url, encoder=encoder or TinyEncoder(), **{**BASE, **kwargs}
  )
  _WRITERS[str(url)] = tree
  return tree


def peek(url, encoder=None, **kwargs):
  """What a reader sees, also while the tree is open for writing."""
  return MegaContextTree.open(
    url, encoder=encoder or TinyEncoder(), mode="r", **{**BASE, **kwargs}
  )


def round_trip(dtype):
  return lambda x: tree_format.unpack_gists(tree_format.pack_gists(x, dtype))


def check(tree, ids, encoder=None, dtype="bfloat16", keyer=None):
  """The tree holds exactly the history `ids`, by content."""
  encoder = encoder or TinyEncoder()
  assert tree.cursor == len(ids) == tree.num_nodes(0)
  np.testing.assert_array_equal(tree.tokens(0, len(ids)), ids)
  levels = reference_gists(encoder, ids, round_trip(dtype))
  assert tree.top_level == len(levels)
  assert tree.num_nodes(len(levels) + 1) == 0
  for level, gists in enumerate(levels, 1):
    assert tree.num_nodes(level) == len(gists) == len(ids) // 32**level
    np.testing.assert_array_equal(tree.gists(level, 0, len(gists)), gists)
    assert np.abs(gists).max(axis=1).min() > 0
    width = 32**level
    for index in {0, len(gists) // 2, len(gists) - 1}:
      start = max(0, index * width - keys.LOOKBACK)
      span = ids[None, start : (index + 1) * width]
      np.testing.assert_array_equal(
        tree.keys(level, index, index + 1), keys.sketch(span, level)
      )
  blocks = ids[: len(ids) // 32 * 32].reshape(-1, 32)
  rows = np.sort(blocks, axis=1)
  first = np.diff(rows, axis=1, prepend=-1) != 0
  held = np.bincount(rows[first], minlength=VOCAB)
  np.testing.assert_array_equal(tree.block_frequency(np.arange(VOCAB)), held)
  if keyer is None:
    assert tree.lens_fingerprint is None
  else:
    assert tree.lens_fingerprint == keyer.fingerprint
    if levels:
      check_lens_keys(tree, keyer, blocks, levels[0])


def check_lens_keys(tree, keyer, blocks, gists):
  own = keyer.encode_keys(blocks.astype(np.int32), gists)
  for level in range(1, tree.top_level + 1):
    n = tree.num_nodes(level)
    rows = own
    if level > 1:
      below = own[: n * 32 ** (level - 1)].reshape(n, -1, keyer.key_dim)
      rows = np.concatenate([below.min(axis=1), below.max(axis=1)], axis=1)
    found = tree.lens_keys(level, 0, n)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, rows)


class FailingWrites:
  """Lets the first `allowed` writes of a store through, then fails.

  A write that fails may have reached the store in part, as in a crash.
  """

  def __init__(self, monkeypatch, allowed):
    self.left = allowed
    array, record = Store.array, Store.write_record
    outer = self

    def failing_array(store, path, spec, create):
      return _Proxy(array(store, path, spec, create), outer)

    def failing_record(store, value, generation):
      with io_errors("write", store.url):
        outer.spend()
      return record(store, value, generation)

    monkeypatch.setattr(Store, "array", failing_array)
    monkeypatch.setattr(Store, "write_record", failing_record)

  def spend(self):
    self.left -= 1
    if self.left < 0:
      raise OSError("No space left on device")


class _Proxy:
  def __init__(self, array, failing):
    self._array, self._failing = array, failing

  def __getitem__(self, where):
    return _Proxy(self._array[where], self._failing)

  def read(self):
    return self._array.read()

  def write(self, rows):
    try:
      self._failing.spend()
    except OSError:
      low, half = self._array.domain[0].inclusive_min, len(rows) // 2
      if half:
        self._array[low : low + half].write(rows[:half]).result()
      raise
    return self._array.write(rows)
