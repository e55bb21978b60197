"""Gists as keys and values: one slot, written in every layer.

A gist's vector enters the base where a token does. Here the slot gets keys and
values of its own in every layer, pooled from those that the base computed for
the block's tokens: by head, 32 rows are weighted by a learned query and their
place, summed, and passed through a small linear map (after 500xCompressor,
arXiv:2408.03094). That holds far more than one vector, and takes as much more
room: L · 2 · K · H numbers instead of D. It costs next to nothing where the
base has read the block anyway, and a pass of the base where it has not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from mcjax.types import BRANCHING, Array


def init(layers: int, shape: tuple[int, ...]) -> dict:
  """A writer that starts as the mean of the block's keys and values.

  Args:
    layers: of the base (L).
    shape: (query heads, key heads K, channels a head H).
  """
  _, heads, size = shape
  def zeros(*end):
    return jnp.zeros((layers, heads, *end), jnp.float32)
  return {"pick": zeros(2, size), "place": zeros(2, BRANCHING),
          "map_key": zeros(size, size), "map_value": zeros(size, size),
          "shift_key": zeros(size), "shift_value": zeros(size)}


def write(params, keys: Float[Array, "L K S H"],
          values: Float[Array, "L K S H"]
          ) -> tuple[Float[jax.Array, "L K n H"], Float[jax.Array, "L K n H"]]:
  """Keys and values of the gists of whole blocks.

  Args:
    params: of the writer.
    keys: un-rotated keys of the blocks' tokens, S = 32 n.
    values: theirs.

  Returns:
    un-rotated keys and values, one row a block.
  """
  blocks = keys.shape[:2] + (-1, BRANCHING, keys.shape[-1])
  keys, values = (a.reshape(blocks).astype(jnp.float32)
                  for a in (keys, values))
  size = jnp.sqrt(jnp.mean(keys * keys, axis=-1, keepdims=True) + 1e-6)
  scores = jnp.einsum("lknsh,lkrh->lknrs", keys / size, params["pick"])
  weights = jax.nn.softmax(scores + params["place"][:, :, None], axis=-1)
  key = jnp.einsum("lkns,lknsh->lknh", weights[..., 0, :], keys)
  value = jnp.einsum("lkns,lknsh->lknh", weights[..., 1, :], values)
  return tuple(
    a + jnp.einsum("lknh,lkhe->lkne", a, params[f"map_{name}"])
    + params[f"shift_{name}"][:, :, None]
    for name, a in (("key", key), ("value", value)))


def flops_per_token(layers: int, shape: tuple[int, ...]) -> int:
  """Multiply-adds x 2 a token, without the base's own pass."""
  _, heads, size = shape
  pooled = 2 * 2 * size  # two scores, two sums
  return 2 * layers * heads * (pooled + 2 * size * size // BRANCHING)


def bytes_per_token(layers: int, shape: tuple[int, ...]) -> float:
  """Stored bytes a token in bfloat16."""
  _, heads, size = shape
  return np.prod((layers, 2, heads, size, 2)) / BRANCHING
