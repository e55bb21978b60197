"""The cache of many windows: rows apart, moves, changed places, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import rotation
from mcjax.testing import tiny_base
from mcjax.window import row_cache
from mcjax.window.row_cache import Held, RowCache

SLOTS = 300  # 256 near ones


@pytest.fixture
def config():
  return tiny_base.make_lm().config


def filled(config, wide=True, **kwargs):
  """A cache of two rows of which the second holds random keys."""
  cache = RowCache(config, 2, SLOTS, jnp.float32, wide, **kwargs)
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


def test_a_narrow_cache_holds_near_slots_until_a_far_one_is_written(config):
  cache, held = filled(config, wide=False)
  near = row_cache.near_slots(SLOTS)
  assert near == 256 and not cache.is_wide and len(cache.take()) == 1
  cache, held = filled(config, wide=False)
  after, _ = cache.read(1)
  np.testing.assert_array_equal(after.keys[..., :near], held.keys[..., :near])
  assert not np.asarray(after.keys)[..., near:].any()
  slots = np.array([2, 299, SLOTS], np.int32)
  cache.write(1, slots, held.keys[..., :3], held.values[:, :, :3],
              np.full(SLOTS, 4, np.int32))
  after, stood = cache.read(1)
  assert cache.is_wide
  np.testing.assert_array_equal(after.keys[..., slots[:2]],
                                held.keys[..., :2])
  np.testing.assert_array_equal(np.flatnonzero(stood == 4), slots[:2])


def test_work_that_is_cut_off_loses_all_rows_and_says_so(config):
  cache, _ = filled(config)
  cache.take()  # and never given back
  after, _ = cache.read(1)
  assert cache.lost == 1 and not np.asarray(after.keys).any()
  cache.read(1)
  assert cache.lost == 1 and not cache.notice()
