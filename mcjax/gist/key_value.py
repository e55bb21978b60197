"""Gists as keys and values: one slot, written in every layer.

A gist's vector enters the base where a token does. Here the slot gets keys and
values of its own in every layer, pooled from those that the base computed for
the block's tokens. A slot has to answer a query as 32 rows did: with as much
attention, and with the value that they mix. For one query both have a closed
form: rows are weighted by their softmax, keys and values summed by these
weights, and the logarithm of the softmax's sum becomes a bias of the slot's
logit. So a head's query is what is learned; it starts as the mean query of real
text. Small linear maps follow.

This holds more than one vector and takes as much more room: L · K · (2 H + 1)
numbers instead of D. It costs next to nothing where the base has read the block
anyway, and a pass of the base where it has not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from mcjax.types import BRANCHING, Array


class Written(NamedTuple):
  """Gists of n blocks.

  Attributes:
    keys: [L, K, n, H] un-rotated.
    values: [L, K, n, H].
    bias: [L, K, n] of their attention logits.
  """

  keys: Float[jax.Array, "L K n H"]
  values: Float[jax.Array, "L K n H"]
  bias: Float[jax.Array, "L K n"]


def init(layers: int, shape: tuple[int, ...], queries=None) -> dict:
  """A writer before its training.

  Args:
    layers: of the base (L).
    shape: (query heads, key heads K, channels a head H).
    queries: [L, K, H] mean un-rotated queries of the base's heads; without
      them it starts as the mean of keys and values.
  """
  _, heads, size = shape
  def zeros(*end):
    return jnp.zeros((layers, heads, *end), jnp.float32)
  pick = zeros(size)
  if queries is not None:
    pick = jnp.asarray(queries, jnp.float32)
  return {"pick": pick, "place": zeros(BRANCHING), "bias": zeros(),
          "map_key": zeros(size, size), "map_value": zeros(size, size),
          "shift_key": zeros(size), "shift_value": zeros(size)}


def write(params, keys: Float[Array, "L K S H"],
          values: Float[Array, "L K S H"]) -> Written:
  """The gists of whole blocks.

  Args:
    params: of the writer.
    keys: un-rotated keys of the blocks' tokens, S = 32 n.
    values: theirs.
  """
  blocks = keys.shape[:2] + (-1, BRANCHING, keys.shape[-1])
  keys, values = (a.reshape(blocks).astype(jnp.float32)
                  for a in (keys, values))
  root = np.float32(np.sqrt(keys.shape[-1]))
  pick = params["pick"] / root
  logits = jnp.einsum("lknsh,lkh->lkns", keys, pick)
  logits = logits + params["place"][:, :, None]
  weights = jax.nn.softmax(logits, axis=-1)
  key = jnp.einsum("lkns,lknsh->lknh", weights, keys)
  value = jnp.einsum("lkns,lknsh->lknh", weights, values)
  mass = jax.nn.logsumexp(logits, axis=-1)
  bias = mass - jnp.einsum("lknh,lkh->lkn", key, pick)
  def mapped(a, name):
    a = a + jnp.einsum("lknh,lkhe->lkne", a, params[f"map_{name}"])
    return a + params[f"shift_{name}"][:, :, None]
  return Written(mapped(key, "key"), mapped(value, "value"),
                 bias + params["bias"][:, :, None])
