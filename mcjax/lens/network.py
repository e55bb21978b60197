"""LensNet: a signed focus score for every block that an edit could concern.

Three ways lead from a block to its score. How it matches the query in words
and meaning (`lens.features`) goes through a small network of its own. Its gist
is compared with the query's gist. And blocks and tail attend to each other
(dual cross-attention, cost O(R * tail)), not causally: the tail says what the
next tokens will need, so an old block must see it. From all of these together
comes how much is worth reading at all, and whether the history answers. The
score is bounded by tanh: positive asks for the block's raw tokens, negative
does without them.

The key and query heads give every block a small vector, whose match with the
query's is a feature. Unless the weights hold a better table of keys
(`lens.keyer`), these vectors are also stored in the tree, and blocks anywhere
in the history are found by them. Flax Linen modules, used as pure functions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, cast

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mcjax.focus.policy import WISH
from mcjax.lens.features import CONSTANT, FEATURES, TAIL, LensInputs
from mcjax.types import BRANCHING, Array

KEY_SCALE = 254.0  # of a unit vector's components before rounding to int8
APART = ((1, 1), (2, 3), (4, 8))  # blocks between two that compete
_MOST = 6.0  # standard deviations that a feature counts at most


@dataclasses.dataclass(frozen=True)
class LensNetConfig:
  """Sizes of LensNet; hashable, a jit static.

  Attributes:
    d_model: width D of embeddings and gists.
    width: inner width of the cross-attention.
    heads: attention heads.
    layers: rounds of blocks -> tail -> blocks.
    feature_width: hidden width of the features' own path to the score.
    match_dim: width in which gists of block and query are compared.
    key_dim: K, length of a block's key.
    features: number of features, which tells versions apart.
    gists: whether it reads gists and the tail, which are the base's own; one
      that does not serves every base of a tokenizer, and needs a table of keys.
  """

  d_model: int
  width: int = 64
  heads: int = 4
  layers: int = 2
  feature_width: int = 64
  match_dim: int = 96
  key_dim: int = 64
  features: int = FEATURES
  gists: bool = True


class Scores(NamedTuple):
  """What LensNet says of a window.

  Attributes:
    rank: [R] logits among each other: how likely a block is the one needed.
    worth: [R] logits of what its raw tokens are worth; tanh is the score.
    answerable: [] logit that the history holds what is asked for.
  """

  rank: Array
  worth: Array
  answerable: Array


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
  """`Scores` of blocks."""

  config: LensNetConfig

  @nn.compact
  def __call__(self, inputs: LensInputs) -> Scores:
    """Scores every block of a window; see `LensInputs` for shapes."""
    mask = inputs.mask
    mean = self.param("mean", nn.initializers.zeros, (FEATURES,))
    scale = self.param("scale", nn.initializers.ones, (FEATURES,))
    mean, scale = jax.lax.stop_gradient((mean, scale))
    features = jnp.clip(
      (inputs.features - mean[None]) * scale[None], -_MOST, _MOST)
    rank = self._by_features(features)
    if self.config.gists:
      rank = rank + self._by_gist(inputs) + self._by_tail(features, inputs)
    rank = jnp.where(mask, rank, -1e9)
    total = jax.nn.logsumexp(rank)
    best = jnp.max(rank)
    facts = jnp.concatenate([
      features[0, np.array(CONSTANT)],
      jnp.clip(jnp.stack([best, total]) / 8, -4, 4)])
    facts = nn.gelu(nn.Dense(32, name="facts")(facts))
    level, answerable = nn.Dense(2, name="level")(facts)
    slope = nn.softplus(self.param("slope", nn.initializers.ones, ()))
    return Scores(rank, slope * (rank - total) + level + 2.0, answerable)

  def _by_features(self, features) -> jax.Array:
    c = self.config
    x = nn.gelu(nn.Dense(c.feature_width, name="feature_in")(features))
    x = x + nn.gelu(nn.Dense(c.feature_width, name="feature_mid")(x))
    return nn.Dense(1, use_bias=False, name="feature_score")(x)[:, 0]

  def _by_gist(self, inputs: LensInputs) -> jax.Array:
    c, unit = self.config, nn.RMSNorm(use_scale=False, name="unit")
    block = nn.Dense(c.match_dim, use_bias=False, name="match_block")(
      unit(inputs.gists))
    query = nn.Dense(c.match_dim, use_bias=False, name="match_query")(
      unit(inputs.query))
    cosine = _unit(block) @ _unit(query)
    return 10.0 * cosine * self.param("match", nn.initializers.zeros, ())

  def _by_tail(self, features, inputs: LensInputs) -> jax.Array:
    c, unit = self.config, nn.RMSNorm(use_scale=False, name="unit_tail")
    x = nn.Dense(c.width, use_bias=False, name="project_gists")(
      unit(inputs.gists))
    x = x + nn.Dense(c.width, name="project_features")(features)
    y = nn.Dense(c.width, use_bias=False, name="project_tail")(
      unit(inputs.tail))
    y = y + self.param(
      "tail_position", nn.initializers.normal(0.02), (TAIL, c.width)
    )
    for i in range(c.layers):
      y = _CrossAttention(c, name=f"tail_reads_blocks_{i}")(y, x, inputs.mask)
      x = _CrossAttention(c, name=f"blocks_read_tail_{i}")(
        x, y, inputs.tail_mask)
    x = nn.RMSNorm(name="final_norm")(x)
    # Content starts at no say: matches carry the score until it has learned.
    zero = nn.initializers.zeros
    return nn.Dense(1, use_bias=False, kernel_init=zero, name="score")(x)[:, 0]


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)


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
  """Deterministic untrained parameters.

  "score" holds those for prompts, "text" those for text that is read on, "keys"
  the key heads, "apart" what neighbours of better blocks lose.
  """
  d = config.d_model
  lens, heads, text = jax.random.split(jax.random.key(seed), 3)
  empty = LensInputs(
    jnp.zeros((BRANCHING, FEATURES)), jnp.zeros((BRANCHING, d)),
    jnp.zeros(BRANCHING, jnp.int32), jnp.ones(BRANCHING, bool), jnp.zeros(d),
    jnp.zeros((TAIL, d)), jnp.ones(TAIL, bool))
  init = jax.jit(LensNet(config).init)
  params = {"score": init(lens, empty)["params"],
            "text": init(text, empty)["params"],
            "apart": jnp.zeros(len(APART))}
  if config.gists:  # key heads read the base's embeddings
    params["keys"] = jax.jit(KeyHeads(config).init)(
      heads, jnp.zeros((BRANCHING, d)))["params"]
  return params


def key_tables(params, config: LensNetConfig, embeddings: jax.Array):
  """`KeyHeads` over a base's embeddings [V, D]; see there."""
  return KeyHeads(config).apply(
    {"params": params["keys"]}, embeddings.astype(jnp.float32)
  )


def evaluate(params, config: LensNetConfig, inputs: LensInputs,
             part: str = "score") -> Scores:
  """`Scores` of one window; `part` of the parameters is "score" or "text"."""
  return cast(Scores, LensNet(config).apply({"params": params[part]}, inputs))


def overshadowed(rank: Array, block: Array, mask: Array) -> jax.Array:
  """Whether a better block stands in each distance of `APART`: bool [R, 3].

  Neighbours say much the same, so of several the best is worth most.
  """
  far = jnp.abs(block[:, None] - block[None])
  better = (rank[None] > rank[:, None]) & mask[None]
  return jnp.stack([
    jnp.any(better & (far >= low) & (far <= high), axis=1)
    for low, high in APART], axis=1)


@functools.partial(jax.jit, static_argnames="config")
def apply(score, apart, config: LensNetConfig, inputs: LensInputs
          ) -> tuple[jax.Array, jax.Array]:
  """Scores of one window.

  Args:
    score: "score" or "text" of the parameters, for a prompt or for text.
    apart: [3] of the parameters; zeros for text.
    config: sizes.
    inputs: of the window.

  Returns:
    scores [R] in (-1, 1), 0 for padding; how surely it answers, in (0, 1).
  """
  out = evaluate({"score": score}, config, inputs)
  shadow = overshadowed(out.rank, inputs.block, inputs.mask)
  slope = nn.softplus(jnp.asarray(score["slope"]))  # apart is in logits of rank
  worth = _after(out.worth, slope * (shadow.astype(jnp.float32) @ apart))
  scores = jnp.where(inputs.mask, jnp.tanh(worth), 0.0)
  return scores, jax.nn.sigmoid(out.answerable)


def _after(worth: Array, less: jax.Array) -> jax.Array:
  """Logits of blocks that give way by `less`, but are wished for as before."""
  least = np.arctanh(np.float32(WISH))
  return jnp.where(
    worth > least, least + nn.softplus(worth - least - less), worth)


def flops(config: LensNetConfig, rows: int) -> int:
  """Multiply-adds x 2 of one forward over `rows` blocks."""
  c, w = config, config.width
  inputs = (rows + TAIL) * c.d_model * w + rows * c.d_model * c.match_dim
  inputs += rows * FEATURES * (w + c.feature_width) + rows * c.feature_width**2
  one = 2 * w * w + 4 * w * w  # query, out; feed-forward
  attention = 2 * rows * TAIL * w
  layer = 2 * attention + (rows + TAIL) * (one + 2 * w * w)
  return 2 * (inputs + c.layers * layer) + rows * rows * len(APART)
