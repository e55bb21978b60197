"""The decoder's products with parameters of another type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import decoder_layer, model
from mcjax.testing import tiny_base


@pytest.mark.parametrize("spec, shapes", [
  ("td,df->tf", ((5, 8), (8, 6))),
  ("td,dnh->tnh", ((5, 8), (8, 2, 3))),
  ("tnh,nhd->td", ((5, 2, 3), (2, 3, 8))),
  ("td,dkh->kth", ((5, 8), (8, 2, 3)))])
def test_mixed_product_and_both_its_gradients(spec, shapes):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in shapes)
  short = w.astype(jnp.bfloat16)
  x = x.astype(jnp.bfloat16).astype(jnp.float32)  # nothing is lost by rounding

  def weighted(x, w):
    y = decoder_layer.product(spec, x, w)
    assert y.dtype == jnp.float32
    ramp = jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)
    return jnp.sum(y * ramp)  # small whole numbers are exact in bfloat16

  found = jax.jit(jax.value_and_grad(weighted, (0, 1)))(x, short)
  plain = jax.jit(jax.value_and_grad(weighted, (0, 1)))(
    x, short.astype(jnp.float32))
  np.testing.assert_allclose(found[0], plain[0], rtol=1e-5)
  np.testing.assert_allclose(found[1][0], plain[1][0], rtol=1e-5, atol=1e-5)
  assert found[1][1].dtype == jnp.bfloat16
  np.testing.assert_allclose(
    found[1][1].astype(jnp.float32), plain[1][1], rtol=2 ** -7, atol=1e-5)


@pytest.fixture(scope="module")
def adapted(tiny_lm):
  """A base that reads gists through a random adapter."""
  return tiny_base.adapted(tiny_lm)


@pytest.fixture(scope="module")
def entries():
  """Inputs [9, 32] and positions [9]; three of them are gists."""
  rng = np.random.default_rng(0)
  gists = np.isin(np.arange(9), (1, 2, 5))
  return (jnp.asarray(rng.normal(size=(9, 32)).astype(np.float32)),
          jnp.arange(9, dtype=jnp.int32), jnp.asarray(gists))


_forward = jax.jit(model.forward, static_argnums=1)


def test_an_adapter_changes_gists_and_what_reads_them(
    adapted, tiny_lm, entries):
  x, places, gists = entries
  plain = _forward(tiny_lm.params, tiny_lm.config, x, places)[0]
  unmarked = _forward(adapted.params, adapted.config, x, places)[0]
  read = _forward(adapted.params, adapted.config, x, places, gists=gists)[0]
  np.testing.assert_array_equal(unmarked, plain)
  np.testing.assert_array_equal(read[0], plain[0])  # before the first gist
  assert np.abs(read - plain)[1:].max(axis=1).min() > 0.01
  logits = model.unembed(adapted.params, read)
  np.testing.assert_allclose(
    logits, tiny_base.plain_logits(adapted, x, places, gists), atol=1e-4)


def test_unstacked_layers_and_branches_adapt_alike(adapted, entries):
  x, places, gists = entries
  params, config = adapted.params, adapted.config
  whole = _forward(params, config, x, places, gists=gists)[0]
  layers = model.unstacked(params)
  np.testing.assert_allclose(
    _forward(layers, config, x, places, gists=gists)[0], whole, atol=2e-5)
  branch = jax.jit(model.forward_branches, static_argnums=1)(
    params, config, x[:6], places[:6], x[None, 6:], places[None, 6:],
    jnp.ones((1, 6), bool), gists=gists[:6])[0]
  np.testing.assert_allclose(branch[0], whole[6:], atol=2e-5)
