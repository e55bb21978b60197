"""What the tests check of signatures besides their types."""

import jax.numpy as jnp
import jaxtyping
import pytest

from mcjax.base import decoder_layer, model


def test_a_wrong_shape_fails_at_the_call():
  scale = jnp.ones(4, jnp.float32)
  with pytest.raises(jaxtyping.TypeCheckError, match="scale"):
    decoder_layer.rms_norm(jnp.ones((2, 8), jnp.float32), scale, 1e-5)


def test_a_wrong_dtype_fails_at_the_call():
  with pytest.raises(jaxtyping.TypeCheckError, match="token_ids"):
    model.embed({"embed": jnp.ones((3, 2))}, jnp.ones(3, jnp.float32))
