"""Lens keys: exact scores, bounds, and what a keyer may return."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest

from mcjax.testing.tree_reference import TinyKeyer
from mcjax.tree import learned_keys as lens_keys

KEYS = st.integers(-127, 127)
FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)
QUERY = hnp.arrays(
  np.int32,
  5,
  elements=st.integers(-lens_keys.QUERY_MAX, lens_keys.QUERY_MAX),
)


@given(hnp.arrays(np.int8, (64, 5), elements=KEYS), QUERY)
def test_scores_are_exact_and_bounds_hold_up_the_tree(blocks, query):
  score = lens_keys.scorer(query)
  exact = blocks.astype(int) @ query.astype(int)
  assert score(blocks).tolist() == exact.tolist()
  parents = lens_keys.bounds(blocks.reshape(2, 32, 5), 5)
  assert parents.dtype == np.int8
  parts = parents.astype(int).reshape(2, 2, 5) * query.astype(int)
  assert score(parents).tolist() == parts.max(axis=1).sum(axis=1).tolist()
  assert (score(parents) >= exact.reshape(2, 32).max(axis=1)).all()
  top = lens_keys.bounds(np.tile(parents, (16, 1))[None], 5)
  np.testing.assert_array_equal(
    top[0], np.concatenate([blocks.min(axis=0), blocks.max(axis=0)])
  )
  assert score(top)[0] >= score(parents).max()


def test_the_bound_of_equal_blocks_is_their_score():
  block = np.array([[-127, 5, 127]], np.int8)
  parent = lens_keys.bounds(np.repeat(block[None], 32, axis=1), 3)
  score = lens_keys.scorer(np.array([3, -4, -5]))
  assert score(parent) == score(block) == [-127 * 3 - 5 * 4 - 127 * 5]


def test_keys_above_the_blocks_are_twice_as_wide():
  assert [lens_keys.key_width(level, 64) for level in (1, 2, 5)] == [
    64, 128, 128,
  ]  # fmt: skip


@given(hnp.arrays(np.float32, 6, elements=FLOATS))
def test_a_quantised_query_keeps_its_direction(query):
  whole = lens_keys.quantise(query)
  assert whole.dtype == np.int32
  largest = np.abs(query).max()
  if largest == 0:
    assert not whole.any()
    return
  assert np.abs(whole).max() == lens_keys.QUERY_MAX
  step = largest.astype(float) / lens_keys.QUERY_MAX
  assert np.abs(whole * step - query).max() <= 0.5001 * step


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_that_is_not_finite(bad):
  with pytest.raises(ValueError, match="not finite"):
    lens_keys.quantise(np.array([1, bad]))


def test_a_query_is_of_whole_numbers_and_of_the_keys_width():
  with pytest.raises(ValueError, match="float64"):
    lens_keys.scorer(np.ones(4))
  with pytest.raises(ValueError, match="do not fit a query of 4"):
    lens_keys.scorer(np.ones(4, np.int32))(np.zeros((2, 5), np.int8))


@pytest.mark.parametrize(
  "keys",
  [
    np.zeros((2, 4), np.int32),
    np.zeros((2, 3), np.int8),
    np.zeros((1, 4), np.int8),
    np.full((2, 4), -128, np.int8),
  ],
)
def test_what_a_keyer_may_not_return(keys):
  keyer = TinyKeyer()
  keyer.encode_keys = lambda token_ids, gists: keys
  with pytest.raises(ValueError, match="lens key"):
    lens_keys.block_keys(
      keyer, np.zeros((2, 32), np.int32), np.zeros((2, 8), np.float32)
    )
