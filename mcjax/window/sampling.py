"""How the next token is drawn: settings as arrays, so that none recompiles."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.types import Array, McjaxError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of one answer, applied in the order given.

  Attributes:
    repetition_penalty: divides the logits of tokens that prompt and answer
      hold already (multiplies negative ones); 1 does nothing.
    temperature: 0 is greedy.
    top_k: only so many of the likeliest tokens; 0 takes all.
    top_p: only the likeliest tokens that together reach this probability.
    min_p: only tokens of at least this share of the likeliest one's
      probability.
  """

  repetition_penalty: float = 1.0
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    for name, low, high in (
      ("repetition_penalty", 1e-3, 1e3), ("temperature", 0, 1e3),
      ("top_k", 0, 2**31 - 1), ("top_p", 0, 1), ("min_p", 0, 1),
    ):
      value = getattr(self, name)
      kinds = (int,) if name == "top_k" else (int, float)
      right = isinstance(value, kinds) and not isinstance(value, bool)
      if not right or not low <= value <= high:
        raise McjaxError(f"{name} must be in [{low}, {high}], got {value!r}")


class Rows(NamedTuple):
  """Settings of B rows.

  Attributes:
    numbers: [B, 5] float32, the fields of `Sampling` in order.
    keys: [B] PRNG keys.
    drawn: [B] int32 tokens drawn before with this key.
    seen: [B, V] bool, tokens that prompt and answer hold.
  """

  numbers: Array
  keys: Array
  drawn: Array
  seen: Array


def numbers_of(sampling: Sampling) -> np.ndarray:
  """The fields as [5] float32."""
  return np.array(dataclasses.astuple(sampling), np.float32)


def draw(rows: Rows, logits: jax.Array, step: jax.Array) -> jax.Array:
  """Token ids [B] int32 from logits [B, V], number `step` of this block."""
  penalty, temperature, top_k, top_p, min_p = (
    column[:, None] for column in rows.numbers.T)
  scores = jax.lax.cond(
    jnp.any(penalty != 1.0), lambda: _penalised(logits, rows.seen, penalty),
    lambda: logits)

  def sampled():
    warm = scores / jnp.where(temperature > 0, temperature, 1.0)
    cut = jax.lax.cond(
      jnp.any((top_k > 0) | (top_p < 1)),
      lambda: _truncated(warm, top_k, top_p), lambda: warm)
    floor = jnp.max(warm, axis=-1, keepdims=True) + jnp.log(min_p)
    cut = jnp.where(warm >= floor, cut, -jnp.inf)
    noise = jax.vmap(_noise, in_axes=(0, 0, None))(
      rows.keys, rows.drawn + step, logits.shape[-1])
    noisy = jnp.argmax(cut + noise, axis=-1)
    return jnp.where(temperature[:, 0] > 0, noisy, jnp.argmax(scores, axis=-1))

  token = jax.lax.cond(
    jnp.any(temperature > 0), sampled, lambda: jnp.argmax(scores, axis=-1))
  return token.astype(jnp.int32)


def _noise(key, number, size):
  return jax.random.gumbel(jax.random.fold_in(key, number), (size,))


def _penalised(logits, seen, penalty):
  return jnp.where(
    seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _truncated(scores, top_k, top_p):
  """Scores [B, V], -inf where top-k or top-p leaves a token out."""
  size = scores.shape[-1]
  falling = -jnp.sort(-scores, axis=-1)
  k = jnp.where(top_k > 0, jnp.minimum(top_k, size), size).astype(jnp.int32)
  falling = jnp.where(jnp.arange(size)[None, :] < k, falling, -jnp.inf)
  chance = jax.nn.softmax(falling, axis=-1)
  before = jnp.cumsum(chance, axis=-1) - chance
  kept = (before < top_p) & (falling > -jnp.inf)
  kept = kept.at[:, 0].set(True)
  least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(scores >= least, scores, -jnp.inf)
