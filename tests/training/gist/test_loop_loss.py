"""Windows as the loop has them: what stands where, and what is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import model
from mcjax.gist import weights as gist_weights
from mcjax.training.gist import loop_loss, losses
from mcjax.types import McjaxError

_O = losses.Objective(loop=True, upper=1, expanded=2, near=32, segment=32,
                      window=32 + 1024 + 5 * 32 + 64, chunk=40)
_LOWER = losses.Objective(loop=True, expanded=1, near=32, segment=32,
                          window=32 + 4 * 32 + 64, chunk=40)


def _ids(o, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).integers(0, 64, o.window), jnp.int32)


def _params(tiny_gist_config):
  params = gist_weights.init_params(
    dataclasses.replace(tiny_gist_config, adapter_layers=2))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda a: a + 0.05 * rng.normal(size=a.shape).astype(np.float32), params)


def test_a_window_holds_the_text_in_order(tiny_lm):
  ids, d = _ids(_O), tiny_lm.config.d_model
  upper, lower = jnp.full((1, d), 7.0), jnp.arange(
    5 * d, dtype=jnp.float32).reshape(5, d)
  seen = loop_loss.arrange(
    tiny_lm.params, _O, ids, upper, lower, jax.random.key(3))
  order = np.argsort(seen.places, kind="stable")
  order = order[np.asarray(seen.visible)[order]]
  np.testing.assert_array_equal(
    seen.places[order], np.arange(32 + 1 + 3 + 2 * 32 + 64))
  x, gists = np.asarray(seen.x)[order], np.asarray(seen.gists)[order]
  table = np.asarray(tiny_lm.params["embed"])
  np.testing.assert_array_equal(x[:32], table[ids[:32]])
  assert gists[32] and np.all(x[32] == 7.0)
  blocks = np.asarray(ids[32 + 1024 : -64]).reshape(5, 32)
  at, opened = 33, 0
  for block, gist in zip(blocks, np.asarray(lower), strict=True):
    if gists[at]:
      np.testing.assert_array_equal(x[at], gist)
      at += 1
    else:
      np.testing.assert_array_equal(x[at : at + 32], table[block])
      at, opened = at + 32, opened + 1
  assert opened == 2
  np.testing.assert_array_equal(x[at:], table[ids[-64:]])


def test_losses_are_those_of_plain_forwards(tiny_lm, tiny_gist_config):
  """The teacher reads all text, the hidden student all but gists."""
  ids, o = _ids(_LOWER), dataclasses.replace(_LOWER, expanded=0)
  params = gist_weights.init_params(tiny_gist_config)
  _, found = jax.jit(loop_loss.window_loss, static_argnums=(1, 3, 4))(
    params, tiny_gist_config, tiny_lm.params, tiny_lm.config, o, ids,
    jax.random.key(0))

  def plain(ids):
    x = model.embed(tiny_lm.params, ids)
    hidden = model.forward(tiny_lm.params, tiny_lm.config, x,
                           jnp.arange(len(ids), dtype=jnp.int32))[0]
    return float(jnp.mean(model.token_nll(
      tiny_lm.params, hidden[-32:-1], ids[-31:])))

  np.testing.assert_allclose(found["teacher_nll_loop"], plain(ids), rtol=1e-5)
  raw = jnp.concatenate([ids[:32], ids[-64:]])
  np.testing.assert_allclose(found["nll_loop_hidden"], plain(raw), rtol=1e-5)


def test_every_block_and_every_weight_takes_part(tiny_lm, tiny_gist_config):
  params = _params(tiny_gist_config)
  config = dataclasses.replace(tiny_gist_config, adapter_layers=2)

  @jax.jit
  def step(params, ids):
    return jax.value_and_grad(lambda p: loop_loss.window_loss(
      p, config, tiny_lm.params, tiny_lm.config, _O, ids,
      jax.random.key(1))[0])(params)

  ids = _ids(_O)
  loss, slopes = step(params, ids)
  still = [jax.tree_util.keystr(path) for path, a
           in jax.tree_util.tree_leaves_with_path(slopes) if not np.any(a)]
  assert not still
  for at in (5, 40, 1000, 32 + 1024 + 10, len(ids) - 40):
    changed = ids.at[at].set((ids[at] + 1) % 64)
    assert step(params, changed)[0] != loss


@pytest.mark.parametrize("fields, match", [
  (dict(upper=2), "upper"), (dict(expanded=5), "expanded"),
  (dict(level=2), "level"), (dict(loop=False), "loop")])
def test_windows_that_cannot_be_are_refused(fields, match):
  with pytest.raises(McjaxError, match=match):
    dataclasses.replace(_O, **fields)
