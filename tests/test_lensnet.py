"""LensNet: bounded, not causal, blind to padding; its gathering policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_base

from mcjax import Config, MegaContext, lensnet
from mcjax.lensnet import FEATURES, TAIL, TAIL_GISTS
from mcjax.lensnet_policy import LensNetPolicy

CONFIG = lensnet.LensNetConfig(d_model=16, width=16, heads=2, layers=2)
SLOTS = 24


@pytest.fixture(scope="module")
def params():
  """Untrained, and moved a bit so that no branch is silent."""
  start = jax.jit(lambda: lensnet.init_params(CONFIG))()
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

  entry_mask = np.ones(SLOTS, bool)
  entry_mask[18:] = False
  tail_mask = np.ones(TAIL, bool)
  tail_mask[[3, 30]] = False
  return dict(
    entries=draw(SLOTS, 16), features=draw(SLOTS, FEATURES),
    entry_mask=jnp.asarray(entry_mask), tail=draw(TAIL, 16),
    tail_mask=jnp.asarray(tail_mask),
  )


def reach(params, name):
  """|d score_i / d input_j| summed over channels: [SLOTS, rows]."""
  given = inputs()

  def scores(x):
    return lensnet.apply(params, CONFIG, **{**given, name: x})

  return np.abs(np.asarray(jax.jacrev(scores)(given[name]))).sum(-1)


@pytest.mark.parametrize("name", ["tail", "entries", "features"])
def test_every_input_reaches_every_score_and_masked_ones_none(params, name):
  """No causal mask: an old entry sees the newest token, and the reverse."""
  given = inputs()
  mask = given["tail_mask" if name == "tail" else "entry_mask"]
  seen = np.asarray(given["entry_mask"])
  got = reach(params, name)[seen]
  assert (got[:, np.asarray(mask)] > 1e-7).all()
  assert (got[:, ~np.asarray(mask)] == 0).all()


def test_a_causal_mask_would_be_noticed(params, monkeypatch):
  """The trap: entries that see only what stands before them."""
  real = jax.nn.softmax

  def causal(scores, axis):
    rows, columns = scores.shape[-2:]
    old = jnp.arange(columns)[None, :] <= jnp.arange(rows)[:, None]
    return real(jnp.where(old[None], scores, -1e30), axis)

  monkeypatch.setattr(jax.nn, "softmax", causal)
  lensnet.apply.clear_cache()
  try:
    got = reach(params, "tail")[np.asarray(inputs()["entry_mask"])]
  finally:
    lensnet.apply.clear_cache()
  assert not (got[:, np.asarray(inputs()["tail_mask"])] > 1e-7).all()


def test_scores_are_bounded_and_signed(params):
  given = inputs()
  scores = np.asarray(lensnet.apply(params, CONFIG, **given))
  assert scores.shape == (SLOTS,) and np.abs(scores).max() < 1
  assert scores.min() < 0 < scores.max()
  huge = {**given, "entries": given["entries"] * np.float32(1e6)}
  assert np.isfinite(lensnet.apply(params, CONFIG, **huge)).all()


def test_the_order_of_slots_is_nothing(params):
  given = inputs()
  order = np.random.RandomState(1).permutation(SLOTS)
  mixed = {
    k: v[order] if k in ("entries", "features", "entry_mask") else v
    for k, v in given.items()
  }
  np.testing.assert_allclose(
    lensnet.apply(params, CONFIG, **mixed),
    lensnet.apply(params, CONFIG, **given)[order], atol=1e-6,
  )


def test_the_order_of_the_tail_matters(params):
  given = inputs()
  rolled = {**given, "tail": jnp.roll(given["tail"], 1, axis=0),
            "tail_mask": jnp.ones(TAIL, bool)}
  whole = {**given, "tail_mask": jnp.ones(TAIL, bool)}
  difference = lensnet.apply(params, CONFIG, **rolled) - lensnet.apply(
    params, CONFIG, **whole
  )
  assert np.abs(difference).max() > 1e-4


def test_every_parameter_has_a_gradient(params):
  given = inputs()
  weights = jnp.asarray(
    np.random.RandomState(3).standard_normal(SLOTS).astype(np.float32)
  )
  gradients = jax.grad(
    lambda p: jnp.sum(lensnet.apply(p, CONFIG, **given) * weights)
  )(params)
  for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_features_by_hand():
  level = np.array([0, 1, 2, 9])
  width = 32**level.astype(np.int64)
  start = np.array([0, 32, 1024, 0])
  features = lensnet.entry_features(level, start, width, cursor=5000)
  assert features.shape == (4, FEATURES) and features.dtype == np.float32
  np.testing.assert_array_equal(
    features[:, :7].argmax(axis=1), [0, 1, 2, 6]
  )
  np.testing.assert_array_equal(features[:, :7].sum(axis=1), 1)
  np.testing.assert_allclose(features[:, 7], [0, 0.5, 1, 4.5])
  np.testing.assert_allclose(features[1, 8], np.log2(1 + 5000 - 64) / 20)
  assert features[3, 8] == 0  # reaches beyond the cursor
  np.testing.assert_allclose(features[0, 9], 1 - 0.5 / 5000)


# --- The policy --------------------------------------------------------------


class Spy(LensNetPolicy):
  """Keeps what LensNet was last given."""

  def score(self, view):
    self.tail = self._tail(view, view.context_lm)
    self.scores = super().score(view)
    self.entries = view.entries
    return self.scores


def spied(tiny_lm, tiny_gistnet, count):
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(window=512, policy="lensnet", recent_tokens=64, gists_per_level=8),
    gistnet=tiny_gistnet,
  )
  mc.ingest(tiny_base.text(count))
  policy = mc._loop._policy
  mc._loop._policy = Spy(
    policy.config, policy.params, tiny_gistnet, trained=False
  )
  mc._loop.refocus(need=32)
  return mc, mc._loop._policy


def test_the_tail_holds_gists_a_provisional_one_and_newest_tokens(
  tiny_lm, tiny_gistnet
):
  mc, spy = spied(tiny_lm, tiny_gistnet, 2109)  # 65 blocks and 30 tokens
  tail, mask = spy.tail
  assert mask.all()
  coarse, fine = mc.tree.gists(2, 0, 2), mc.tree.gists(1, 61, 65)
  np.testing.assert_array_equal(tail[:2], coarse)
  np.testing.assert_array_equal(tail[2:TAIL_GISTS], fine)
  newest = mc.tree.tokens(mc.cursor - 32, mc.cursor)
  table = np.asarray(tiny_lm.params["embed"])
  np.testing.assert_array_equal(tail[TAIL_GISTS + 1 :], table[newest])
  np.testing.assert_allclose(
    tail[TAIL_GISTS], tiny_gistnet.encode_tokens(newest[None])[0], rtol=1e-5
  )
  assert len(spy.scores) == len(spy.entries)
  assert len(np.unique(spy.scores)) > 10


def test_a_short_history_has_a_short_tail(tiny_lm, tiny_gistnet):
  _, spy = spied(tiny_lm, tiny_gistnet, 20)
  mask = spy.tail[1]
  assert not mask[: TAIL_GISTS + 1].any()
  assert mask[TAIL_GISTS + 1 :].sum() == 21


def test_the_newest_token_moves_old_scores(tiny_lm, tiny_gistnet):
  """A question at the end must reach the first entries."""
  scores = []
  for last in "xy":
    mc, spy = spied(tiny_lm, tiny_gistnet, 2000)
    mc.ingest(last)
    mc._loop.refocus(need=32)
    scores.append(spy.scores)
  old = slice(0, 40)
  assert np.abs(scores[0][old] - scores[1][old]).min() > 0
