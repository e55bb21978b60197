"""LensNet: bounded, not causal, blind to padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.focus.policy import WISH
from mcjax.lens import features as lens_features
from mcjax.lens import network as lensnet
from mcjax.lens.features import FEATURES, TAIL, LensInputs

CONFIG = lensnet.LensNetConfig(
  d_model=16, width=16, heads=2, layers=2, feature_width=8, match_dim=8,
  key_dim=8)
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
  return jax.tree.map(jnp.asarray, LensInputs(
    draw(ROWS, FEATURES), draw(ROWS, 16),
    (3 * rng.permutation(ROWS)).astype(np.int32), mask, draw(16),
    draw(TAIL, 16), tail_mask))


def apply(params, given):
  return lensnet.apply(params["score"], params["apart"], CONFIG, given)[0]


def reach(params, name):
  """|d score_i / d input_j| summed over channels: [ROWS, rows]."""
  given = inputs()

  def rank(x):
    out = lensnet.evaluate(params, CONFIG, given._replace(**{name: x}))
    return jnp.where(given.mask, out.rank, 0.0)

  return np.abs(np.asarray(
    jax.jit(jax.jacrev(rank))(getattr(given, name)))).sum(-1)


@pytest.mark.parametrize("name", ["tail", "gists", "features"])
def test_every_input_reaches_every_score_and_masked_ones_none(params, name):
  """No causal mask: an old block sees the newest token, and the reverse."""
  given = inputs()
  mask = np.asarray(given.tail_mask if name == "tail" else given.mask)
  seen = np.asarray(given.mask)
  got = reach(params, name)
  assert (got[seen][:, mask] > 1e-9).all()
  assert (got[:, ~mask] == 0).all() and (got[~seen] == 0).all()


def test_a_causal_mask_would_be_noticed(params, monkeypatch):
  """The trap: blocks that see only what stands before them."""
  real = jax.nn.softmax

  def causal(scores, axis):
    rows, columns = scores.shape[-2:]
    old = jnp.arange(columns)[None, :] <= jnp.arange(rows)[:, None]
    return real(jnp.where(old[None], scores, -1e30), axis)

  monkeypatch.setattr(jax.nn, "softmax", causal)
  got = reach(params, "tail")
  given = inputs()
  got = got[np.asarray(given.mask)][:, np.asarray(given.tail_mask)]
  assert not (got > 1e-9).all()


def test_scores_are_bounded_and_signed(params):
  given = inputs()
  scores, answerable = lensnet.apply(
    params["score"], params["apart"], CONFIG, given)
  scores = np.asarray(scores)
  assert scores.shape == (ROWS,) and np.abs(scores).max() <= 1
  assert 0 < answerable < 1
  assert (scores[18:] == 0).all()
  huge = given._replace(gists=given.gists * np.float32(1e6))
  assert np.isfinite(apply(params, huge)).all()


def test_the_order_of_rows_is_nothing_and_that_of_the_tail_matters(params):
  given = inputs()
  # What is the same for every row is read from the first.
  features = np.array(given.features)
  features[:, list(lensnet.CONSTANT)] = features[0, list(lensnet.CONSTANT)]
  given = given._replace(features=jnp.asarray(features))
  order = np.random.RandomState(1).permutation(ROWS)
  mixed = given._replace(**{
    k: getattr(given, k)[order] for k in ("features", "gists", "block", "mask")
  })
  want = apply(params, given)
  np.testing.assert_allclose(apply(params, mixed), want[order], atol=1e-5)
  whole = given._replace(tail_mask=jnp.ones(TAIL, bool))
  rolled = whole._replace(tail=jnp.roll(given.tail, 1, axis=0))
  difference = lensnet.evaluate(params, CONFIG, rolled).rank - (
    lensnet.evaluate(params, CONFIG, whole).rank)
  assert np.abs(difference[:18]).max() > 1e-5


def test_every_score_parameter_has_a_gradient(params):
  given = inputs()
  weights = np.random.RandomState(3).standard_normal(18).astype(np.float32)

  def total(p):
    out = lensnet.evaluate(p, CONFIG, given)
    return jnp.sum((out.rank + out.worth)[:18] * weights) + out.answerable

  gradients = jax.jit(jax.grad(total))(params)["score"]
  fixed = gradients.pop("mean"), gradients.pop("scale")
  assert not any(np.any(g) for g in fixed), "statistics of the data"
  for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_neighbours_of_a_better_block_lose(params):
  rank = jnp.array([3.0, 2.0, 1.0, 0.0])
  block = jnp.array([10, 11, 14, 40])
  shadow = np.asarray(lensnet.overshadowed(rank, block, jnp.ones(4, bool)))
  np.testing.assert_array_equal(shadow, [
    [0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]])
  given = inputs()._replace(block=jnp.arange(ROWS, dtype=jnp.int32))
  level = dict(params["score"]["level"])
  level["bias"] = level["bias"] + jnp.array([8.0, 0.0])  # all are wished for
  params = {**params, "score": {**params["score"], "level": level}}
  apart = apply({**params, "apart": jnp.array([9.0, 0.0, 0.0])}, given)[:18]
  alike = apply({**params, "apart": jnp.zeros(3)}, given)[:18]
  assert np.any(apart < alike), "they come later"
  assert (alike > WISH).all() and (apart > WISH).all(), "but they come"


def test_flops_are_those_of_the_compiled_forward():
  """Within the small change of norms, masks and activations."""
  config, rows = lensnet.LensNetConfig(d_model=96, key_dim=8), 128
  params = lensnet.init_params(config)
  given = lens_features.empty_inputs(rows, 96)
  counted = lensnet.apply.lower(
    params["score"], params["apart"], config, given
  ).compile().cost_analysis()["flops"]
  assert 0.8 < lensnet.flops(config, rows) / counted < 1.2
