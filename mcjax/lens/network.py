"""LensNet: a signed focus score for every block that an edit could concern.

Blocks and tail attend to each other (dual cross-attention, cost O(R * tail)),
not causally: the tail says what the next tokens will need, so an old block
must see it. Token statistics of block and query, computed on the device, and
the match of learned keys come in as features. The score is bounded by tanh:
positive asks for the block's raw tokens, negative does without them.

The key and query heads give every block a small vector, whose match with the
query's is one of these features. Unless the weights hold a better table of
keys (`lens_keyer`), these vectors are also stored in the tree, and blocks
anywhere in the history are found by them. Flax Linen modules, used as pure
functions.

Source: MegaContext, "LensNet"; design brief, sections 2.9 and 2.12.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from mcjax.lens.features import MARGIN, SPAN, TAIL, LensInputs
from mcjax.types import BRANCHING, Array

FEATURES = 25
KEY_SCALE = 254.0  # of a unit vector's components before rounding to int8
_RARITY_POWER = 1.5  # as in `keys.query_weights`


@dataclasses.dataclass(frozen=True)
class LensNetConfig:
  """Sizes of LensNet; hashable, a jit static.

  Attributes:
    d_model: width D of embeddings and gists.
    width: inner width.
    heads: attention heads.
    layers: rounds of blocks -> tail -> blocks.
    feature_width: hidden width of the features' own path to the score.
    key_dim: K, length of a block's key.
  """

  d_model: int
  width: int = 96
  heads: int = 4
  layers: int = 2
  feature_width: int = 48
  key_dim: int = 64


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
  """Logits [R] of blocks; their tanh is the score."""

  config: LensNetConfig

  @nn.compact
  def __call__(
    self,
    gists: Float[Array, "R D"],
    features: Float[Array, "R F"],
    mask: Bool[Array, " R"],
    tail: Float[Array, "T D"],
    tail_mask: Bool[Array, " T"],
  ) -> Float[jax.Array, " R"]:
    """Scores every block.

    Args:
      gists: [R, D] of the blocks.
      features: [R, FEATURES] float32, see `block_features`.
      mask: [R] bool, False for padding.
      tail: [T, D] what happens now: gists and newest tokens.
      tail_mask: [T] bool.
    """
    c = self.config
    unit = nn.RMSNorm(use_scale=False, name="unit")
    x = nn.Dense(c.width, use_bias=False, name="project_gists")(unit(gists))
    x = x + nn.Dense(c.width, name="project_features")(features)
    y = nn.Dense(c.width, use_bias=False, name="project_tail")(unit(tail))
    y = y + self.param(
      "tail_position", nn.initializers.normal(0.02), (TAIL, c.width)
    )
    for i in range(c.layers):
      y = _CrossAttention(c, name=f"tail_reads_blocks_{i}")(y, x, mask)
      x = _CrossAttention(c, name=f"blocks_read_tail_{i}")(x, y, tail_mask)
    x = nn.RMSNorm(name="final_norm")(x)
    own = nn.Dense(c.feature_width, name="feature_up")(features)
    own = nn.Dense(1, name="feature_score")(nn.gelu(own))[:, 0]
    # Content starts at no say: statistics carry the score until it has learned.
    zero = nn.initializers.zeros
    return own + nn.Dense(
      1, use_bias=False, kernel_init=zero, name="score"
    )(x)[:, 0]


class KeyHeads(nn.Module):
  """Tables over the vocabulary from which keys and queries are summed.

  Every token has a vector [K] and two saliences: how much it counts in a
  block's key and in a query.
  """

  config: LensNetConfig

  @nn.compact
  def __call__(self, embeddings):
    """[V, D] -> vectors [V, K], saliences in keys [V] and in queries [V]."""
    c = self.config
    # Embeddings share a large common part, which tells nothing.
    centred = embeddings - jnp.mean(embeddings, axis=0, keepdims=True)
    unit = nn.RMSNorm(use_scale=False, name="unit")(centred)
    vectors = nn.Dense(c.key_dim, use_bias=False, name="vectors")(unit)
    salience = nn.Dense(
      2, name="salience", kernel_init=nn.initializers.zeros
    )(unit)
    weights = jax.nn.softplus(salience)
    return vectors, weights[:, 0], weights[:, 1]


def init_params(config: LensNetConfig, seed: int = 0):
  """Deterministic untrained parameters: {"score": …, "keys": …}."""
  d = config.d_model
  lens, heads = jax.random.split(jax.random.key(seed))
  score = jax.jit(LensNet(config).init)(
    lens, jnp.zeros((BRANCHING, d)), jnp.zeros((BRANCHING, FEATURES)),
    jnp.ones(BRANCHING, bool), jnp.zeros((TAIL, d)), jnp.ones(TAIL, bool),
  )["params"]
  keys = jax.jit(KeyHeads(config).init)(heads, jnp.zeros((BRANCHING, d)))
  return {"score": score, "keys": keys["params"]}


def key_tables(params, config: LensNetConfig, embeddings: jax.Array):
  """`KeyHeads` over a base's embeddings [V, D]; see there."""
  return KeyHeads(config).apply(
    {"params": params["keys"]}, embeddings.astype(jnp.float32)
  )


def block_keys(
  tables, token_ids: Int[Array, "n T"]
) -> Float[jax.Array, "n K"]:
  """Unit keys [n, K] of blocks of token ids [n, T]; -1 is no token."""
  vectors, salience, _ = tables
  return _summed(vectors, salience, token_ids, jnp.ones(token_ids.shape))


def query_key(
  tables, token_ids: Int[Array, "... Q"], weights: Float[Array, "... Q"]
) -> Float[jax.Array, "... K"]:
  """Unit query [..., K] of token ids [..., Q], -1 for none, with weights."""
  vectors, _, salience = tables
  return _summed(vectors, salience, token_ids, weights)


def _summed(vectors, salience, token_ids, weights) -> jax.Array:
  at = jnp.maximum(token_ids, 0)
  weights = salience[at] * jnp.where(token_ids >= 0, weights, 0.0)
  total = jnp.einsum("...t,...tk->...k", weights, vectors[at])
  length = jnp.sqrt(jnp.sum(jnp.square(total), -1, keepdims=True) + 1e-6)
  return total / length


def block_features(
  inputs: LensInputs, match: Float[Array, " R"]
) -> Float[jax.Array, "R F"]:
  """What token statistics say of every block, [R, FEATURES] float32.

  Args:
    inputs: see `LensInputs`.
    match: [R] cosine of the blocks' keys and the query's.
  """
  x = inputs
  ids = x.ids
  weights = x.query_weights * x.query_rarity**_RARITY_POWER
  cover, pairs, strongest = _overlap(
    ids, x.query_ids, weights, x.query_rarity)
  fading = np.float32(0.5) ** (
    np.arange(BRANCHING - 1, -1, -1, dtype=np.float32) / 8)
  rare = x.newest_rarity**_RARITY_POWER
  now, now_pairs, now_strongest = _overlap(
    ids, x.newest_ids, rare, x.newest_rarity)
  ending, ending_pairs, _ = _overlap(
    ids, x.newest_ids, rare * fading, x.newest_rarity)

  def best(v):
    return v / (jnp.max(jnp.where(x.mask, v, 0.0)) + 1e-3)

  strong = [cover, pairs, best(cover), best(pairs), match, best(match)]
  columns = [
    *jnp.moveaxis(jax.nn.one_hot(x.state, 3), 1, 0),
    jnp.log2(1 + jnp.maximum(x.distance, 0) / BRANCHING) / 16,
    jnp.minimum(x.distance, 2048) / 2048,
    jnp.where(x.distance < 256, 1 - x.distance / 256, 0.0),
    *strong, strongest / 10, now, now_pairs, best(now), now_strongest / 10,
    ending, ending_pairs,
    jnp.broadcast_to(x.asked, cover.shape), *(x.asked * v for v in strong[:5]),
  ]
  return jnp.stack(columns, axis=1).astype(jnp.float32)


def _overlap(ids, query_ids, weights, rarity):
  """Share of the query's tokens and pairs in each block, and its rarest.

  Args:
    ids: [R, SPAN] int32; the margins count half.
    query_ids: [Q] int32, -1 for none.
    weights: [Q] float32.
    rarity: [Q] float32 nats.

  Returns:
    three [R] float32.
  """
  near = np.full(SPAN, 0.5, np.float32)
  near[MARGIN : MARGIN + BRANCHING] = 1.0
  known = query_ids >= 0
  same = (ids[:, :, None] == query_ids[None, None]) & known[None, None]
  held = jnp.max(jnp.where(same, near[None, :, None], 0.0), axis=1)
  cover = held @ weights / (jnp.sum(weights) + 1e-6)
  strongest = jnp.max(held * rarity[None], axis=1)
  both = same[:, :-1, :-1] & same[:, 1:, 1:]
  near = np.maximum(near[:-1], near[1:])
  held = jnp.max(jnp.where(both, near[None, :, None], 0.0), axis=1)
  pair = jnp.minimum(weights[:-1], weights[1:])
  return cover, held @ pair / (jnp.sum(pair) + 1e-6), strongest


def logits(params, config: LensNetConfig, inputs: LensInputs,
           match: Float[Array, " R"]) -> Float[jax.Array, " R"]:
  """Logits [R]: about ten times the nats a token that raw tokens are worth."""
  features = block_features(inputs, match)
  found = LensNet(config).apply(
    {"params": params["score"]}, inputs.gists, features, inputs.mask,
    inputs.tail, inputs.tail_mask,
  )
  return cast(jax.Array, found)


@functools.partial(jax.jit, static_argnames="config")
def apply(params, config: LensNetConfig, inputs: LensInputs,
          match: jax.Array) -> jax.Array:
  """Scores [R] in (-1, 1); 0 for padding."""
  scores = jnp.tanh(logits(params, config, inputs, match))
  return jnp.where(inputs.mask, scores, 0.0)


def flops(config: LensNetConfig, rows: int) -> int:
  """Multiply-adds x 2 of one forward over `rows` blocks."""
  c, w = config, config.width
  inputs = (rows + TAIL) * c.d_model * w + rows * FEATURES * (
    w + c.feature_width)
  one = 2 * w * w + 4 * w * w  # query, out; feed-forward
  attention = 2 * rows * TAIL * w
  layer = 2 * attention + (rows + TAIL) * (one + 2 * w * w)
  overlap = rows * SPAN * (128 + 2 * BRANCHING) * 2
  return 2 * (inputs + c.layers * layer) + overlap
