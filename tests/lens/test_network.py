"""LensNet: bounded, not causal, blind to padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.lens import features as lens_rows
from mcjax.lens import network as lensnet
from mcjax.lens.features import BURIED, GIST, MARGIN, RAW, SPAN, TAIL

CONFIG = lensnet.LensNetConfig(
  d_model=16, width=16, heads=2, layers=2, feature_width=8, key_dim=8
)
ROWS = 24


@pytest.fixture(scope="module")
def params():
  """Untrained, and moved a bit so that no branch is silent."""
  start = lensnet.init_params(CONFIG)
  rng = np.random.RandomState(0)
  return jax.tree.map(
    lambda a: a + np.float32(0.1) * rng.standard_normal(a.shape).astype(
      np.float32
    ), start,
  )


def inputs(seed=0):
  rng = np.random.RandomState(seed)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

  mask = np.ones(ROWS, bool)
  mask[18:] = False
  tail_mask = np.ones(TAIL, bool)
  tail_mask[[3, 30]] = False
  query = np.full(lens_rows.QUERY, -1, np.int32)
  query[:9] = rng.randint(0, 40, 9)
  rarity = np.zeros(lens_rows.QUERY, np.float32)
  rarity[:9] = rng.uniform(1, 5, 9)
  given = lens_rows.LensInputs(
    rng.randint(0, 40, (ROWS, SPAN)).astype(np.int32), draw(ROWS, 16),
    rng.randint(0, 3, ROWS).astype(np.int32),
    rng.uniform(0, 4000, ROWS).astype(np.float32), mask, query,
    (rarity > 0).astype(np.float32), rarity,
    rng.randint(0, 40, 32).astype(np.int32),
    rng.uniform(1, 5, 32).astype(np.float32), np.float32(1), draw(TAIL, 16),
    tail_mask,
  )
  return jax.tree.map(jnp.asarray, given), draw(ROWS)


def reach(params, name):
  """|d score_i / d input_j| summed over channels: [ROWS, rows]."""
  given, match = inputs()

  def scores(x):
    if name == "match":
      return lensnet.apply(params, CONFIG, given, x)
    return lensnet.apply(params, CONFIG, given._replace(**{name: x}), match)

  x = match[:, None] if name == "match" else getattr(given, name)
  run = (lambda x: scores(x[:, 0])) if name == "match" else scores
  return np.abs(np.asarray(jax.jit(jax.jacrev(run))(x))).sum(-1)


@pytest.mark.parametrize("name", ["tail", "gists", "match"])
def test_every_input_reaches_every_score_and_masked_ones_none(params, name):
  """No causal mask: an old block sees the newest token, and the reverse."""
  given, _ = inputs()
  mask = np.asarray(given.tail_mask if name == "tail" else given.mask)
  seen = np.asarray(given.mask)
  got = reach(params, name)
  assert (got[seen][:, mask] > 1e-8).all()
  assert (got[:, ~mask] == 0).all() and (got[~seen] == 0).all()


def test_a_causal_mask_would_be_noticed(params, monkeypatch):
  """The trap: blocks that see only what stands before them."""
  real = jax.nn.softmax

  def causal(scores, axis):
    rows, columns = scores.shape[-2:]
    old = jnp.arange(columns)[None, :] <= jnp.arange(rows)[:, None]
    return real(jnp.where(old[None], scores, -1e30), axis)

  monkeypatch.setattr(jax.nn, "softmax", causal)
  lensnet.apply.clear_cache()
  try:
    got = reach(params, "tail")
  finally:
    lensnet.apply.clear_cache()
  given, _ = inputs()
  got = got[np.asarray(given.mask)][:, np.asarray(given.tail_mask)]
  assert not (got > 1e-8).all()


def test_scores_are_bounded_and_signed(params):
  given, match = inputs()
  scores = np.asarray(lensnet.apply(params, CONFIG, given, match))
  assert scores.shape == (ROWS,) and np.abs(scores).max() < 1
  assert scores.min() < 0 < scores.max()
  assert (scores[18:] == 0).all()
  huge = given._replace(gists=given.gists * np.float32(1e6))
  assert np.isfinite(lensnet.apply(params, CONFIG, huge, match)).all()


def test_the_order_of_rows_is_nothing_and_that_of_the_tail_matters(params):
  given, match = inputs()
  order = np.random.RandomState(1).permutation(ROWS)
  mixed = given._replace(**{
    k: getattr(given, k)[order]
    for k in ("ids", "gists", "state", "distance", "mask")
  })
  want = lensnet.apply(params, CONFIG, given, match)
  np.testing.assert_allclose(
    lensnet.apply(params, CONFIG, mixed, match[order]), want[order], atol=1e-6)
  whole = given._replace(tail_mask=jnp.ones(TAIL, bool))
  rolled = whole._replace(tail=jnp.roll(given.tail, 1, axis=0))
  difference = lensnet.apply(params, CONFIG, rolled, match) - lensnet.apply(
    params, CONFIG, whole, match)
  assert np.abs(difference).max() > 1e-4


def test_every_score_parameter_has_a_gradient(params):
  given, match = inputs()
  weights = np.random.RandomState(3).standard_normal(ROWS).astype(np.float32)
  gradients = jax.jit(jax.grad(
    lambda p: jnp.sum(lensnet.apply(p, CONFIG, given, match) * weights)
  ))(params)["score"]
  for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_features_by_hand():
  ids = np.full((3, SPAN), -1, np.int32)
  ids[0, MARGIN : MARGIN + 2] = [5, 6]  # the query's pair, inside
  ids[1, 0:2] = [5, 6]  # in the margin
  ids[2, MARGIN] = 9
  given, _ = inputs()
  query = np.full(lens_rows.QUERY, -1, np.int32)
  query[:3] = [5, 6, 7]
  rarity = np.zeros(lens_rows.QUERY, np.float32)
  rarity[:3] = [4, 1, 1]
  given = given._replace(
    ids=ids, state=np.array([RAW, GIST, BURIED], np.int32),
    distance=np.array([0, 128, 4096], np.float32), mask=np.ones(3, bool),
    query_ids=query, query_weights=(rarity > 0).astype(np.float32),
    query_rarity=rarity, newest_ids=np.full(32, 9, np.int32),
    newest_rarity=np.ones(32, np.float32), asked=np.float32(1))
  match = np.array([0.5, 0.0, -0.5], np.float32)
  x = np.asarray(lensnet.block_features(given, match))
  assert x.shape == (3, lensnet.FEATURES) and x.dtype == np.float32
  np.testing.assert_array_equal(x[:, :3], np.eye(3))
  np.testing.assert_allclose(x[1, 3], np.log2(5) / 16, rtol=1e-6)
  np.testing.assert_allclose(x[:, 5], [1, 0.5, 0])
  np.testing.assert_allclose(x[:, 6], [0.9, 0.45, 0], rtol=1e-5)  # 9 of 10
  np.testing.assert_allclose(x[:, 7], [0.5, 0.25, 0], rtol=1e-5)  # 1 of 2 pairs
  np.testing.assert_allclose(x[:, 10], match)
  np.testing.assert_allclose(x[:, 12], [0.4, 0.2, 0], rtol=1e-6)
  np.testing.assert_allclose(x[:, 13], [0, 0, 1], atol=1e-6)
  np.testing.assert_array_equal(x[:, 19], 1)
  plain = given._replace(asked=np.float32(0))
  assert not np.asarray(lensnet.block_features(plain, match))[:, 19:].any()
