"""The slot cache's jitted functions: padding, sizes, what they write."""

import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.testing import tiny_base
from mcjax.window import kv_slots
from mcjax.window.row_cache import RowCache

SLOTS = 64


def arrays(count=20, seed=0):
  """A cache whose first `count` timeline entries lie in shuffled slots."""
  rng = np.random.RandomState(seed)
  lm = tiny_base.make_lm()
  cache = RowCache(lm.config, 1, SLOTS, lm.params["embed"].dtype, SLOTS)
  slots = rng.permutation(SLOTS)[:count].astype(np.int32)
  ids = rng.randint(0, 256, count).astype(np.int32)
  positions = np.zeros(SLOTS, np.int32)
  positions[slots] = np.arange(count)
  visible = np.zeros(SLOTS, bool)
  visible[slots] = True
  return lm, cache.read(0)[0], slots, ids, positions, visible


def padded(slots, size):
  return np.concatenate([slots, np.full(size - len(slots), SLOTS, np.int32)])


def spliced(lm, held, slots, ids, positions, visible, size, width=0,
            gist=None):
  """A splice of `slots`, of which one may hold a gist (row, vector)."""
  gists = np.zeros((size, lm.config.d_model), np.float32)
  is_gist = np.zeros(size, bool)
  if gist is not None:
    is_gist[gist[0]], gists[gist[0]] = True, gist[1]
  return kv_slots.splice(
    lm.params, lm.config, held, padded(slots, size),
    np.pad(ids, (0, size - len(ids))), gists, is_gist, positions, visible,
    width)


def test_a_gist_is_read_in_place_of_a_token():
  lm, *args = arrays()
  table = np.asarray(lm.params["embed"])
  plain = spliced(lm, *args, 24).hidden
  same = spliced(lm, *args, 24, gist=(5, table[args[2][5]])).hidden
  np.testing.assert_array_equal(plain[:20], same[:20])
  other = spliced(lm, *args, 24, gist=(5, table[args[2][5]] + 2)).hidden
  np.testing.assert_array_equal(plain[:5], other[:5])
  assert np.abs(np.asarray(plain - other)[5:20]).max(axis=1).min() > 1e-4


@pytest.mark.parametrize("size", [20, 24, 56])
def test_a_splice_of_everything_is_a_plain_forward(size):
  lm, held, slots, ids, positions, visible = arrays()
  out = spliced(lm, held, slots, ids, positions, visible, size, width=60)
  x = np.asarray(lm.params["embed"])[ids]
  plain = tiny_base.plain_logits(lm, x, np.arange(20))
  for row in (0, 7, 19):
    np.testing.assert_allclose(
      kv_slots.next_logits(lm.params, out.hidden, np.int32(row)), plain[row],
      atol=1e-4,
    )
  targets = np.zeros(size, np.int32)
  targets[:19] = ids[1:]
  np.testing.assert_allclose(
    kv_slots.nll(lm.params, out.hidden, targets)[:19],
    tiny_base.plain_nll(lm, ids)[1:], atol=1e-4,
  )
  assert out.keys.shape[-1] == out.values.shape[-2] == 60


def test_what_is_spliced_later_reads_what_was_stored():
  """First some entries, then the others: as all at once."""
  lm, empty, slots, ids, positions, visible = arrays()
  cache = RowCache(lm.config, 2, SLOTS, jnp.float32, SLOTS)
  shown, hidden = np.zeros(SLOTS, bool), []
  for part in (slice(13), slice(13, 20)):
    shown[slots[part]] = True
    held, _ = cache.read(1)
    out = spliced(
      lm, held, slots[part], ids[part], positions, shown, 24, width=24)
    cache.write(
      1, padded(slots[part], 24), out.keys, out.values, positions)
    hidden.append(out.hidden[: len(slots[part])])
  whole = spliced(lm, empty, slots, ids, positions, visible, 20)
  np.testing.assert_allclose(
    np.concatenate(hidden), whole.hidden, atol=2e-5)
  held, stood = cache.read(1)
  rest = np.setdiff1d(np.arange(SLOTS), slots)
  assert not np.asarray(held.keys)[..., rest].any()
  np.testing.assert_array_equal(stood, positions)
  assert not np.asarray(cache.read(0)[0].keys).any(), "another row"


def test_a_rewritten_slot_is_not_seen_in_its_old_state():
  lm, held, *args = arrays()
  spoiled = held._replace(
    keys=held.keys + np.float32(7), values=held.values - np.float32(5)
  )
  clean = spliced(lm, held, *args, 24).hidden
  dirty = spliced(lm, spoiled, *args, 24).hidden
  np.testing.assert_array_equal(clean[:20], dirty[:20])


def test_a_hidden_entry_changes_nothing_behind_it():
  lm, held, slots, ids, positions, visible = arrays()
  masked, other = visible.copy(), ids.copy()
  masked[slots[5]], other[5] = False, (ids[5] + 99) % 256
  without = spliced(lm, held, slots, ids, positions, masked, 24).hidden
  moved = spliced(lm, held, slots, other, positions, masked, 24).hidden
  np.testing.assert_array_equal(without[6:20], moved[6:20])
  seen = spliced(lm, held, slots, other, positions, visible, 24).hidden
  assert np.abs(np.asarray(seen[6:20] - without[6:20])).max() > 1e-3


@pytest.mark.parametrize("edits", [1, 2, 4, 9])
def test_splice_sizes_hold_every_plan(edits):
  sizes = kv_slots.splice_sizes(edits)
  assert list(sizes) == sorted(sizes) and len(sizes) == edits + 1
  for expands in range(edits + 1):
    run = 32 * expands + (edits - expands) + 1  # and the newest entry
    size = min(s for s in sizes if s >= run)
    assert size - run < 32 and size % 8 == 0
