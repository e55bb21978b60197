"""The cache of many windows: rows apart, moves, changed places, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import rotation
from mcjax.testing import tiny_base
from mcjax.window.pools import Held
from mcjax.window.row_cache import RowCache, near_slots, prior_slots

SLOTS = 300  # 256 near ones


@pytest.fixture
def config():
  return tiny_base.make_lm().config


def filled(config):
  """A cache of two rows of which the second holds random keys."""
  cache = RowCache(config, 2, SLOTS, jnp.float32, near_slots(SLOTS))
  rng = np.random.RandomState(0)
  shape = config.n_layers, config.n_kv_heads
  held = Held(
    jnp.asarray(rng.randn(*shape, config.head_dim, SLOTS), jnp.float32),
    jnp.asarray(rng.randn(*shape, SLOTS, config.head_dim), jnp.float32))
  cache.replace(1, held, np.zeros(SLOTS, np.int32))
  return cache, jax.tree.map(np.asarray, held)


def test_what_moves_is_turned_and_the_rest_stays_to_the_bit(config):
  cache, held = filled(config)
  positions = np.zeros(SLOTS, np.int32)
  positions[5:9] = 31, 40, 7, 900
  visible = np.ones(SLOTS, bool)
  visible[8] = False
  cache.move(1, positions, visible)
  after, stood = cache.read(1)
  np.testing.assert_array_equal(stood, np.where(visible, positions, 0))
  expected = rotation.rotate_keys(
    config, held.keys.swapaxes(2, 3), stood).swapaxes(2, 3)
  np.testing.assert_allclose(after.keys, expected, atol=2e-5)
  still = np.setdiff1d(np.arange(SLOTS), [5, 6, 7])
  np.testing.assert_array_equal(after.keys[..., still], held.keys[..., still])
  np.testing.assert_array_equal(after.values, held.values)
  assert not np.asarray(cache.read(0)[0].keys).any(), "another row"


def test_slots_change_places_between_the_pools(config):
  cache, held = filled(config)
  order = np.arange(SLOTS)
  order[[3, 290]] = 290, 3
  cache.move(1, np.arange(SLOTS, dtype=np.int32), np.ones(SLOTS, bool))
  before, _ = cache.read(1)
  cache.permute(1, order)
  after, stood = cache.read(1)
  np.testing.assert_array_equal(after.keys, before.keys[..., order])
  np.testing.assert_array_equal(after.values, before.values[:, :, order])
  np.testing.assert_array_equal(stood, order)


def test_a_cache_of_few_slots_is_read_as_one_of_many(config):
  few = RowCache(config, 2, 160, jnp.float32, 160)
  cache, held = filled(config)
  assert cache.near == 256 and len(cache.take(far=False)) == 1
  slots = np.array([2, 159, SLOTS], np.int32)
  few.write(1, slots, held.keys[..., :3], held.values[:, :, :3],
            np.full(160, 4, np.int32))
  after, stood = few.read(1, SLOTS)
  np.testing.assert_array_equal(after.keys[..., slots[:2]],
                                held.keys[..., :2])
  assert not np.asarray(after.keys)[..., 160:].any()
  np.testing.assert_array_equal(np.flatnonzero(stood == 4), slots[:2])
  assert len(stood) == SLOTS


def test_prompt_and_answer_take_a_tenth_of_a_window_or_a_little(config):
  assert [prior_slots(n) for n in (128, 544, 1056, 2080, 8224)] == [
    128, 160, 160, 192, 800]


def test_work_that_is_cut_off_loses_all_rows_and_says_so(config):
  cache, _ = filled(config)
  cache.take()  # and never given back
  after, _ = cache.read(1)
  assert cache.lost == 1 and not np.asarray(after.keys).any()
  cache.read(1)
  assert cache.lost == 1 and not cache.notice()
