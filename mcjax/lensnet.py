"""LensNet: a signed focus score for every entry of the working context.

Entries and tail attend to each other (dual cross-attention, cost O(W * tail)),
not causally: the tail says what the next tokens will need, so an old entry
must see it. The score is bounded by tanh: positive asks for finer detail,
negative for coarser. A Flax Linen module used as a pure function.

Source: MegaContext, "LensNet"; design brief, section 2.9.
"""

from __future__ import annotations

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mcjax.types import BRANCHING

FEATURES = 10
_MAX_LEVEL = 6  # one-hot levels; coarser ones share the last
TAIL_GISTS = 6
TAIL = TAIL_GISTS + 1 + BRANCHING  # gists, provisional gist, newest tokens


@dataclasses.dataclass(frozen=True)
class LensNetConfig:
  """Sizes of LensNet; hashable.

  Attributes:
    d_model: width D of entries and tail (the base's embeddings).
    width: inner width.
    heads: attention heads.
    layers: rounds of entries -> tail -> entries.
  """

  d_model: int
  width: int = 192
  heads: int = 6
  layers: int = 2


class _CrossAttention(nn.Module):
  """Pre-norm cross-attention of x [T, width] to y [S, width], residual."""

  config: LensNetConfig

  @nn.compact
  def __call__(self, x, y, mask):
    c = self.config
    shape = (c.heads, c.width // c.heads)
    a, b = nn.RMSNorm(name="norm_x")(x), nn.RMSNorm(name="norm_y")(y)
    q = nn.DenseGeneral(shape, use_bias=False, name="query")(a)
    k = nn.DenseGeneral(shape, use_bias=False, name="key")(b)
    v = nn.DenseGeneral(shape, use_bias=False, name="value")(b)
    scores = jnp.einsum("tnh,snh->nts", q, k) / shape[1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e30), -1)
    mixed = jnp.einsum("nts,snh->tnh", weights, v)
    x = x + nn.DenseGeneral(
      c.width, axis=(-2, -1), use_bias=False, name="out"
    )(mixed)
    y = nn.RMSNorm(name="norm_mlp")(x)
    y = nn.Dense(2 * c.width, use_bias=False, name="up")(y)
    return x + nn.Dense(c.width, use_bias=False, name="down")(nn.gelu(y))


class LensNet(nn.Module):
  """Scores [W] in (-1, 1) of entries [W, D] given features and a tail."""

  config: LensNetConfig

  @nn.compact
  def __call__(self, entries, features, entry_mask, tail, tail_mask):
    """Scores every entry.

    Args:
      entries: [W, D] input embeddings, tokens and gists mixed.
      features: [W, FEATURES] float32, see `entry_features`.
      entry_mask: [W] bool, False for empty slots.
      tail: [T, D] what happens now: gists and newest tokens.
      tail_mask: [T] bool.
    """
    c = self.config
    unit = nn.RMSNorm(use_scale=False, name="unit")
    x = nn.Dense(c.width, use_bias=False, name="project_entries")(unit(entries))
    x = x + nn.Dense(c.width, use_bias=False, name="project_features")(features)
    y = nn.Dense(c.width, use_bias=False, name="project_tail")(unit(tail))
    y = y + self.param(
      "tail_position", nn.initializers.normal(0.02), (TAIL, c.width)
    )
    for i in range(c.layers):
      y = _CrossAttention(c, name=f"tail_reads_entries_{i}")(y, x, entry_mask)
      x = _CrossAttention(c, name=f"entries_read_tail_{i}")(x, y, tail_mask)
    x = nn.RMSNorm(name="final_norm")(x)
    return jnp.tanh(nn.Dense(1, use_bias=False, name="score")(x)[:, 0])


def init_params(config: LensNetConfig, seed: int = 0):
  """Deterministic untrained parameters."""
  d = config.d_model
  return jax.jit(LensNet(config).init)(
    jax.random.key(seed), jnp.zeros((BRANCHING, d)),
    jnp.zeros((BRANCHING, FEATURES)), jnp.ones(BRANCHING, bool),
    jnp.zeros((TAIL, d)), jnp.ones(TAIL, bool),
  )["params"]


@functools.partial(jax.jit, static_argnames="config")
def apply(params, config: LensNetConfig, entries, features, entry_mask, tail,
          tail_mask):
  """Pure LensNet; see `LensNet.__call__`."""
  return LensNet(config).apply(
    {"params": params}, entries.astype(jnp.float32), features, entry_mask,
    tail, tail_mask,
  )


def entry_features(
  level: np.ndarray, start: np.ndarray, width: np.ndarray, cursor: int
) -> np.ndarray:
  """Level (one-hot), span width and distance to the cursor, log-scaled.

  Returns:
    [E, FEATURES] float32.
  """
  features = np.zeros((len(level), FEATURES), np.float32)
  rows = np.arange(len(level))
  features[rows, np.minimum(level, _MAX_LEVEL)] = 1.0
  distance = np.maximum(cursor - start - width, 0)
  features[:, 7] = np.log2(width) / 10.0
  features[:, 8] = np.log2(1.0 + distance) / 20.0
  features[:, 9] = 1.0 - (start + width / 2) / max(cursor, 1)
  return features
