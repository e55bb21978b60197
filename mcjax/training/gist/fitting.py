"""Gists fitted by gradient, so that the base goes on after them as after text.

The base samples continuations behind the raw tokens; Adam moves the gists until
the base's next-token distributions along these are the same behind the gists.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from mcjax.base import model, rotation
from mcjax.training.gist import losses


@functools.partial(jax.jit, static_argnames=("config", "count", "horizon"))
def sample(params, config: model.DecoderConfig, far, key, count: int,
           horizon: int) -> tuple[jax.Array, jax.Array]:
  """Continuations that the base samples after token ids `far` [n].

  Returns:
    token ids [count, horizon] int32, and the base's final hidden states after
    each of them [count, horizon, D].
  """
  n = far.shape[0]
  places = jnp.arange(n, dtype=jnp.int32)
  first, keys, values = model.forward(
    params, config, model.embed(params, far, jnp.float32), places)
  before = model.Segment(
    rotation.rotate_keys(config, keys, places), values, places,
    jnp.ones(places.shape, bool), rotated=True)
  later = n + jnp.arange(horizon, dtype=jnp.int32)
  empty = jnp.zeros(keys.shape[:2] + (horizon,) + keys.shape[3:], keys.dtype)

  def one(key):
    def step(carry, scanned):
      number, key = scanned
      hidden, keys, values = carry
      token = model.sample(
        model.unembed(params, hidden), jnp.float32(1), key)
      own = model.Segment(
        keys, values, later, jnp.arange(horizon) < number)
      x = model.embed(params, token[None], jnp.float32)
      hidden, new_keys, new_values = model.forward(
        params, config, x, later[number][None], (before, own))
      keys, values = (
        jax.lax.dynamic_update_slice(a, b, (0, 0, number, 0))
        for a, b in ((keys, new_keys), (values, new_values)))
      return (hidden[0], keys, values), (token, hidden[0])

    return jax.lax.scan(
      step, (first[-1], empty, empty),
      (jnp.arange(horizon, dtype=jnp.int32), jax.random.split(key, horizon)))[1]

  return jax.vmap(one)(jax.random.split(key, count))


@functools.partial(jax.jit, static_argnames="config")
def divergence(gists, reader, config, tokens, teacher):
  """Mean KL in nats of the base after `gists` [n, D] from the teacher."""
  far, start = losses.gist_segment(reader, config, gists, stride=1)
  places = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
  student = jax.vmap(lambda ids: model.forward(
    reader, config, model.embed(reader, ids, jnp.float32), places, (far,))[0]
  )(tokens)
  flat = student.reshape(-1, student.shape[-1])
  count = flat.shape[0]
  return losses.distribution_loss(
    flat, reader, teacher.reshape(flat.shape), tokens.reshape(-1),
    jnp.full((count,), 1 / count, jnp.float32), 1.0, 0.0, 256)[0]


@functools.partial(jax.jit, static_argnames=("config", "rate"))
def step(reader, config, gists, moments, tokens, teacher, rate: float):
  """One step of Adam; returns the gists and the moments after it."""
  slope = jax.grad(divergence)(gists, reader, config, tokens, teacher)
  with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
    change, moments = optax.adam(rate).update(slope, moments)
  return optax.apply_updates(gists, change), moments
