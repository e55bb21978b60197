"""The objective: alignment, what it sees, and its gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import decoder_layer, model, rotation
from mcjax.gist import weights as gist_weights
from mcjax.training.gist import (
  attention_match,
  foreign_loss,
  level_loss,
  losses,
)
from mcjax.types import McjaxError

_O = losses.Objective(window=128, segment=32, chunk=40)


def _ids(n=128, vocab=64, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).integers(0, vocab, n), jnp.int32)


def _loss(lm, gist_config, o, ids, params=None):
  params = gist_weights.init_params(gist_config) if params is None else params
  return jax.jit(losses.window_loss, static_argnums=(1, 3, 4))(
    params, gist_config, lm.params, lm.config, o, ids, jax.random.key(0))


_layout = jax.jit(losses.layout, static_argnums=1)
_forward = jax.jit(model.forward, static_argnums=1)
_trace = jax.jit(attention_match.trace, static_argnums=1)


def test_distribution_loss_equals_the_plain_formula(tiny_lm):
  rng = np.random.default_rng(2)
  student, teacher = (jnp.asarray(rng.normal(size=(50, 32)).astype(np.float32))
                      for _ in range(2))
  targets = _ids(50)
  weights = jnp.asarray(rng.random(50).astype(np.float32))

  def plain(student):
    p = jax.nn.log_softmax(model.unembed(tiny_lm.params, teacher))
    q = jax.nn.log_softmax(model.unembed(tiny_lm.params, student))
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    nll = -q[jnp.arange(50), targets]
    return jnp.sum(weights * (0.7 * kl + 0.2 * nll))

  def fused(student):
    return losses.distribution_loss(
      student, tiny_lm.params, teacher, targets, weights, 0.7, 0.2, 16)[0]

  for a, b in zip(jax.jit(jax.value_and_grad(fused))(student),
                  jax.jit(jax.value_and_grad(plain))(student), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_random_tokens_cost_ln_vocabulary(tiny_lm, tiny_gist_config):
  """On i.i.d. tokens nothing is predictable: the loss stays at ln V or above.

  The base here is an echo, sure of its own input token, so that a target
  shifted by one would score far below ln V.
  """
  quiet = {k: np.zeros_like(tiny_lm.params["layers"][k])
           for k in ("wo", "w_down")}
  echo = tiny_lm.params | {"layers": tiny_lm.params["layers"] | quiet}
  unit = np.asarray(echo["embed"])
  unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
  echo["embed"] = jnp.asarray(unit)
  o = dataclasses.replace(_O, kl=0.0, nll=1.0)
  gist_params = gist_weights.init_params(tiny_gist_config)
  run = jax.jit(lambda ids: losses.window_loss(
    gist_params, tiny_gist_config, echo, tiny_lm.config, o, ids,
    jax.random.key(0))[1]["nll"])
  nll = np.mean([run(_ids(seed=seed)) for seed in range(20)])
  table = np.asarray(jax.jit(lambda unit: -jax.nn.log_softmax(model.unembed(
    echo, decoder_layer.rms_norm(
      unit, echo["final_norm"], tiny_lm.config.rms_norm_eps))))(unit))
  assert np.diagonal(table).mean() < math.log(64) - 1
  assert nll == pytest.approx(table.mean(), abs=0.15)
  assert nll > math.log(64)


def test_segments_see_only_the_gists_before_them(tiny_lm):
  o = dataclasses.replace(_O, near=32)
  gists = jnp.asarray(
    np.random.default_rng(0).normal(size=(4, 1, 32)).astype(np.float32))
  seen = _layout(tiny_lm.params, o, _ids(), gists)
  assert o.starts == (64, 96)
  np.testing.assert_array_equal(
    seen.visible, [[True, False, False, False], [True, True, False, False]])
  assert seen.places[0, 0] == 1 and seen.places[1, 0] == 2
  np.testing.assert_array_equal(o.index[0], np.arange(32, 96))


@pytest.mark.parametrize("sink", [False, True])
def test_student_matches_the_plain_decoder(tiny_lm, sink):
  """A segment's hidden states equal one run over sink, gists and tokens."""
  o = dataclasses.replace(_O, sink=sink, gist_stride=4)
  gists = jnp.asarray(
    np.random.default_rng(0).normal(0, 0.3, (4, 1, 32)).astype(np.float32))
  ids = _ids()

  @jax.jit
  def student(ids):
    seen = losses.layout(tiny_lm.params, o, ids, gists)
    return losses._student(tiny_lm.params, tiny_lm.config, o, ids, seen,
                           jnp.arange(len(o.starts)))[0]

  hidden = student(ids)
  lead = 32 if sink else 0
  last = o.starts[-1]
  flat = gists[1 if sink else 0 : last // 32, 0]
  n = flat.shape[0]
  x = jnp.concatenate([model.embed(tiny_lm.params, ids[:lead]), flat,
                       model.embed(tiny_lm.params, ids[last : last + 32])])
  places = np.concatenate([np.arange(lead), lead + np.arange(n) * 4 + 2,
                           lead + n * 4 + np.arange(32)])
  plain, _, _ = _forward(
    tiny_lm.params, tiny_lm.config, x, jnp.asarray(places, jnp.int32))
  np.testing.assert_allclose(hidden[-1], plain[-32:], atol=2e-4)


@pytest.mark.parametrize("terms", [
  dict(nll=0.5, rebuild=0.5, attend=1.0, kl_segments=2),
  *(pytest.param(terms, marks=pytest.mark.slow) for terms in (
    dict(), dict(kl=0.0, attend=1.0), dict(rebuild=0.5), dict(nll=0.5),
    dict(early=2.0, near=32, sink=True), dict(remat="layer"),
    dict(kl_segments=2, attend=1.0)))])
def test_terms_are_finite_and_reach_the_network(
    tiny_lm, tiny_gist_config, terms):
  o = dataclasses.replace(_O, **terms)
  (loss, metrics), gradient = jax.jit(jax.value_and_grad(
    lambda p: _loss(tiny_lm, tiny_gist_config, o, _ids(), p),
    has_aux=True))(gist_weights.init_params(tiny_gist_config))
  assert np.isfinite(loss)
  assert all(np.isfinite(v) for v in metrics.values())
  assert np.abs(gradient["w_out"]).max() > 0
  assert np.abs(gradient["scale"]).max() > 0


def test_bfloat16_parameters_change_the_gradient_little(
    tiny_lm, tiny_gist_config):
  """Products of rounded operands: the direction stays, nothing is bfloat16."""
  o = dataclasses.replace(_O, attend=1.0)
  short = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny_lm.params)
  same = jax.tree.map(lambda a: a.astype(jnp.float32), short)

  def both(base):
    return jax.jit(jax.value_and_grad(lambda p: losses.window_loss(
      p, tiny_gist_config, base, tiny_lm.config, o, _ids(),
      jax.random.key(0))[0]))(gist_weights.init_params(tiny_gist_config))

  (exact, wanted), (rounded, found) = both(same), both(short)
  assert float(rounded) == pytest.approx(float(exact), rel=0.02)
  for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found),
                  strict=True):
    assert b.dtype == jnp.float32
    size = float(jnp.linalg.norm(a.ravel()))
    if size > 1e-6:
      assert float(jnp.linalg.norm((a - b).ravel())) < 0.1 * size


@pytest.mark.slow
def test_remat_changes_nothing(tiny_lm, tiny_gist_config):
  values = [_loss(tiny_lm, tiny_gist_config,
                  dataclasses.replace(_O, remat=remat, rebuild=0.3), _ids())[0]
            for remat in ("none", "dots", "layer")]
  np.testing.assert_allclose(values, values[0], rtol=1e-5)


@pytest.mark.parametrize("changes", [
  dict(sink=True, rebuild=0.5, activations="bfloat16", remat="dots"),
  *(pytest.param(c, marks=pytest.mark.slow)
    for c in (dict(attend=1.0), dict(foreign=True)))])
def test_bfloat16_activations_follow_float32(
    tiny_lm, tiny_gist_config, changes):
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny_lm.params)
  lm = dataclasses.replace(tiny_lm, params=half)
  o = dataclasses.replace(_O, **changes)
  wide, short = (
    _loss(lm, tiny_gist_config, dataclasses.replace(o, activations=dtype),
          _ids())[0] for dtype in ("float32", "bfloat16"))
  assert float(short) == pytest.approx(float(wide), rel=0.03)


def test_several_vectors_per_gist(tiny_lm, tiny_gist_config):
  config = dataclasses.replace(tiny_gist_config, slots_per_gist=2)
  o = dataclasses.replace(_O, rebuild=0.5)
  assert np.isfinite(_loss(tiny_lm, config, o, _ids())[0])


def test_trace_equals_the_decoder(tiny_lm):
  x = model.embed(tiny_lm.params, _ids())
  places = jnp.arange(128, dtype=jnp.int32)
  hidden, keys, values = _forward(
    tiny_lm.params, tiny_lm.config, x, places)
  found, rows = _trace(tiny_lm.params, tiny_lm.config, x)
  np.testing.assert_allclose(found, hidden, atol=2e-4)
  np.testing.assert_allclose(rows.keys, keys, atol=2e-4)
  np.testing.assert_allclose(rows.values, values, atol=2e-4)


def test_attention_match_is_zero_on_the_real_keys(tiny_lm):
  """If the far keys are the text's own, the teacher's output comes back."""
  ids = _ids(96)
  x = model.embed(tiny_lm.params, ids)
  _, rows = _trace(tiny_lm.params, tiny_lm.config, x)
  places = jnp.arange(64, dtype=jnp.int32)
  far = (rotation.rotate_keys(tiny_lm.config, rows.keys[:, :, :64], places),
         rows.values[:, :, :64])
  index = jnp.arange(64, 96, dtype=jnp.int32)[None]
  weights = jnp.full((1, 32), 1 / 32, jnp.float32)
  seen = jnp.ones((1, 64), bool)

  @jax.jit
  def match(seen):
    return attention_match.loss(tiny_lm.params, tiny_lm.config, rows, *far,
                                index, index, seen, weights)

  exact, blind = match(seen), match(~seen)
  assert exact < 1e-9 < 1e-3 < blind


def test_contrast_counts_only_pairs_above_the_margin():
  apart = jnp.eye(4, dtype=jnp.float32)
  assert losses.contrast(apart, 0.2) == 0
  same = jnp.ones((4, 4), jnp.float32)
  np.testing.assert_allclose(losses.contrast(same, 0.2), 0.8, rtol=1e-4)


@pytest.mark.parametrize("field, value", [
  ("window", 100), ("segment", 20), ("near", 5), ("gist_stride", 40),
  ("window", 32), ("kl_segments", 9)])
def test_objective_errors_name_the_field(field, value):
  with pytest.raises(McjaxError, match=field):
    dataclasses.replace(_O, **{field: value})


class TestLevelTwo:
  """One gist of gists, taught by the 32 gists below it."""

  O = losses.Objective(window=1024 + 32, segment=32, level=2, nll=0.2, chunk=16)

  def _loss(self, lm, config, params, ids):
    return level_loss.window_loss(
      params, config, lm.params, lm.config, self.O, ids, jax.random.key(0))

  @pytest.mark.slow
  def test_the_stretch_reaches_the_loss_and_every_weight_moves(
      self, tiny_lm, tiny_gist_config):
    params = gist_weights.init_params(tiny_gist_config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda a: a + jnp.asarray(
        rng.normal(0, 0.1, a.shape).astype(np.float32)), params)
    ids = _ids(1056)

    @jax.jit
    def both(ids):
      return jax.value_and_grad(
        lambda p: self._loss(tiny_lm, tiny_gist_config, p, ids),
        has_aux=True)(params)

    (loss, metrics), gradient = both(ids)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
      assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    terms = float(metrics["kl_l2"]) + 0.2 * float(metrics["nll_l2"])
    assert float(loss) == pytest.approx(terms, rel=1e-5)
    assert metrics["kl_l2"] > 0
    other = both(ids.at[40].set((ids[40] + 1) % 64))[0][0]
    assert other != loss

  def test_sizes_are_checked(self):
    with pytest.raises(McjaxError, match="1024"):
      dataclasses.replace(self.O, window=2048)
    with pytest.raises(McjaxError, match="level"):
      dataclasses.replace(self.O, level=3)


def test_foreign_gists_change_nothing_where_they_are_not_seen(
    tiny_lm, tiny_gist_config):
  o = losses.Objective(
    window=160, near=32, segment=32, chunk=40, foreign=True)
  params = gist_weights.init_params(tiny_gist_config)

  def found(ids):
    return jax.jit(foreign_loss.window_loss, static_argnums=(1, 3, 4))(
      params, tiny_gist_config, tiny_lm.params, tiny_lm.config, o, ids,
      jax.random.key(0))

  one, other = _ids(160), _ids(160, seed=1)
  loss, terms = found(one)
  assert loss > 0 and terms["teacher_nll_foreign"] > 0
  mixed = jnp.concatenate([other[:96], one[96:]])
  again = found(mixed)[1]
  # The teacher does not see the far text, the student does.
  np.testing.assert_allclose(
    again["teacher_nll_foreign"], terms["teacher_nll_foreign"], rtol=1e-6)
  assert abs(again["kl_foreign"] - terms["kl_foreign"]) > 1e-4


def test_exchange_takes_the_far_part_of_another_window():
  o = losses.Objective(window=160, near=32, segment=32, foreign=True)
  ids = jnp.stack([_ids(160, seed=n) for n in range(4)]).reshape(2, 2, 160)
  mixed = foreign_loss.exchange(ids, o).reshape(4, 160)
  flat = ids.reshape(4, 160)
  for n in range(4):
    np.testing.assert_array_equal(mixed[n, 96:], flat[n, 96:])
    np.testing.assert_array_equal(mixed[n, :96], flat[n - 1, :96])
  with pytest.raises(McjaxError, match="foreign"):
    losses.Objective(window=160, near=32, sink=True, foreign=True)


@pytest.mark.parametrize("change", [
  dict(qkv_bias=True), dict(qk_norm=True), dict(nope_layers=(1,))])
def test_attention_matching_refuses_other_layers_by_name(tiny_lm, change):
  config = dataclasses.replace(tiny_lm.config, family="qwen3", **change)
  x = model.embed(tiny_lm.params, _ids(), jnp.float32)
  with pytest.raises(McjaxError, match="Objective.attend .* qwen3"):
    attention_match.trace(tiny_lm.params, config, x)
