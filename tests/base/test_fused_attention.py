"""Attention by library kernels equals the decoder's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import fused_attention, model
from mcjax.testing import tiny_base
from mcjax.types import McjaxError

_LOCAL = dict(local_layers=(1,), local_window=6)


@pytest.fixture(scope="module")
def window(tiny_lm):
  """Embeddings [9, D] behind a cache with gaps, and some that are hidden."""
  config, rng = tiny_lm.config, np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(16, config.d_model)).astype(np.float32))
  places = jnp.arange(7, dtype=jnp.int32)
  _, keys, values = model.forward(tiny_lm.params, config, x[:7], places)
  cache = model.Segment(keys, values, places, jnp.arange(7) != 3)
  return (x[7:], jnp.arange(9, dtype=jnp.int32) + 7, (cache,),
          jnp.arange(9) != 4)


def _outputs(lm, config, window):
  """Hidden states, and a slope of them with respect to the inputs."""
  x, places, segments, visible = window

  def total(x):
    hidden = model.forward(
      lm.params, config, x, places, segments, visible)[0]
    return jnp.sum(jnp.sin(hidden)), hidden

  return jax.jit(jax.grad(total, has_aux=True))(x)[::-1]


@pytest.mark.parametrize("changes", [{}, _LOCAL], ids=["all", "local"])
def test_xla_equals_the_plain_form_and_so_does_its_gradient(
    tiny_lm, window, changes):
  config = dataclasses.replace(tiny_lm.config, **changes)
  plain = _outputs(tiny_lm, config, window)
  fused = _outputs(
    tiny_lm, dataclasses.replace(config, attention="xla"), window)
  for found, expected in zip(fused, plain, strict=True):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_xla_adds_the_bias_of_keys_that_stand_for_many(tiny_lm, window):
  x, places, (cache,), visible = window
  shape = (tiny_lm.config.n_layers, tiny_lm.config.n_kv_heads, 7)
  bias = jnp.asarray(np.random.default_rng(1).normal(
    size=shape).astype(np.float32))
  biased = (x, places, (cache._replace(bias=bias),), visible)
  plain = _outputs(tiny_lm, tiny_lm.config, biased)
  fused = _outputs(tiny_lm, dataclasses.replace(
    tiny_lm.config, attention="xla"), biased)
  for found, expected in zip(fused, plain, strict=True):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
  assert np.abs(plain[0] - _outputs(tiny_lm, tiny_lm.config, window)[0]
                ).max() > 1e-2


@pytest.mark.parametrize("kind, activations, platform, words", [
  ("flash", "bfloat16", "gpu", "plain, xla, cudnn, got 'flash'"),
  ("cudnn", "bfloat16", "cpu", "a CUDA GPU; 'xla'"),
  ("cudnn", "float32", "gpu", "activations='bfloat16'"),
  ("splash", "bfloat16", "tpu", "got 'splash' .its masks must be known"),
])
def test_what_cannot_run_is_told(kind, activations, platform, words):
  config = tiny_base.make_lm().config
  with pytest.raises(McjaxError, match=words):
    fused_attention.check(kind, config, activations, platform)


def test_wide_heads_are_not_for_cudnn():
  config = dataclasses.replace(tiny_base.make_lm().config, head_dim=256)
  with pytest.raises(McjaxError, match="at most 128"):
    fused_attention.check("cudnn", config, "bfloat16", "gpu")
  for kind in ("plain", "xla"):
    fused_attention.check(kind, config, "float32", "cpu")
