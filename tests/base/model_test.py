"""The decoder's products with parameters of another type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import model


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
    y = model.product(spec, x, w)
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
