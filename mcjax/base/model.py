"""The frozen decoder: plain functions over a parameter pytree.

A Llama-family decoder that takes embeddings, explicit positions and explicit
key/value segments, so that a working context can hold gists beside tokens and
keep its keys in any physical order. Attention between a query at position p
and a key at position q is allowed when q <= p and the key is visible; nothing
depends on where a key is stored.

New keys come before their rotation (RoFormer, arXiv:2104.09864), cached ones
with or without: a span that moves to another position costs no forward pass.

Parameters (L layers stacked in front, scanned):

  embed [V, D]                 final_norm [D]        unembed [D, V] if not tied
  layers/attn_norm [L, D]      layers/mlp_norm [L, D]
  layers/wq [L, D, N, H]       layers/wk, wv [L, D, K, H]
  layers/wo [L, N, H, D]
  layers/w_gate, w_up [L, D, F]                      layers/w_down [L, F, D]
  layers/bq [L, N, H], bk, bv [L, K, H]              if config.qkv_bias
  layers/bo [L, D]                                   if config.o_bias
  layers/q_norm, k_norm [L, H]                       if config.qk_norm
         [L, N, H], [L, K, H]                        if config.qk_norm_whole
  layers/attn_post_norm, mlp_post_norm [L, D]        if config.post_norm
  gist_adapter/gain, shift [L, D]                    if gists are read by one
  gist_adapter/lora/q, k, v, o/a [L, width, r], b [L, r, …]   and by low-rank
                                             maps of the attention, likewise

`unstacked` gives the same with a tuple of L layers in place of the stack.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key
import numpy as np

from mcjax.base import decoder_layer, rotation
from mcjax.base.decoder_config import DecoderConfig
from mcjax.types import Array

REMAT = ("none", "dots", "layer")  # policies of `forward`


class Segment(NamedTuple):
  """Cached keys and values that queries may attend to.

  Attributes:
    keys: [L, K, S, H], or L arrays [K, S, H]; un-rotated unless `rotated`.
    values: as the keys.
    positions: [S] int32 position of each key.
    visible: [S] bool; False hides the key from every query.
    rotated: whether keys already carry their rotation (a Python bool).
    channels_first: whether keys are [..., K, H, S] instead (a Python bool).
    bias: [L, K, S] added to the attention logits of each key, for keys that
      stand for many; none by default.
  """

  keys: jax.Array | tuple[jax.Array, ...]
  values: jax.Array | tuple[jax.Array, ...]
  positions: Int[Array, " S"]
  visible: Bool[Array, " S"]
  rotated: bool = False
  channels_first: bool = False
  bias: jax.Array | None = None


def embed(
  params, token_ids: Int[Array, "*shape"], dtype=None
) -> Float[jax.Array, "*shape D"]:
  """Token embeddings [..., D] of ids [...], in the parameters' dtype.

  `dtype=jnp.float32` beside bfloat16 parameters makes `forward` keep the
  residual stream, the attention and all gradients in float32.
  """
  rows = jnp.take(params["embed"], token_ids, axis=0, mode="clip")
  return rows if dtype is None else rows.astype(dtype)


def unembed(
  params, hidden: Float[Array, "... D"]
) -> Float[jax.Array, "... V"]:
  """Logits [..., V] in float32 from final hidden states [..., D]."""
  w = params["unembed"] if "unembed" in params else params["embed"]
  spec = "...d,dv->...v" if "unembed" in params else "...d,vd->...v"
  return jnp.einsum(
    spec, hidden.astype(w.dtype), w, preferred_element_type=jnp.float32)


def forward(
  params,
  config: DecoderConfig,
  x: Float[jax.Array, "T D"],
  positions: Int[Array, " T"],
  segments: tuple[Segment, ...] = (),
  visible: Bool[Array, " T"] | None = None,
  remat: str = "none",
  gists: Bool[Array, " T"] | None = None,
) -> tuple[Float[jax.Array, "T D"], Float[jax.Array, "L K T H"],
           Float[jax.Array, "L K T H"]]:
  """Runs the decoder on T entries that also attend to cached segments.

  Args:
    params: parameter pytree, see the module docstring.
    config: static configuration.
    x: [T, D] input embeddings (tokens or gists) in the parameters' dtype, or
      in float32 beside bfloat16 parameters (see `product`).
    positions: [T] int32; equal or smaller positions are attended to.
    segments: cached keys and values.
    visible: [T] bool, False hides the new entry from every query (padding,
      masked gists); all visible by default.
    remat: what of each layer is computed again in the backward pass, one of
      REMAT: nothing, all but its matrix products, or all of it.
    gists: [T] bool, True for gists, which pass through the parameters'
      "gist_adapter" if there is one; none by default.

  Returns:
    hidden [T, D] after the final norm, and the new entries' un-rotated keys
    and values, each [L, K, T, H].
  """
  if visible is None:
    visible = jnp.ones(x.shape[:1], bool)
  own_table = rotation.rope_tables(config, positions)
  tables = [
    None if s.rotated else rotation.rope_tables(config, s.positions)
    for s in segments
  ]
  kinds = rotation.layer_kinds(config)
  caches = [(s.keys, s.values, s.bias) for s in segments]
  adapter = params.get("gist_adapter")

  def step(x, scanned):
    layer, on, caches, adapter = scanned
    x = decoder_layer.adapt(adapter, x, gists)
    current = [
      (k.swapaxes(1, 2) if s.channels_first else k, v, s.positions,
       s.visible, s.rotated, bias)
      for (k, v, bias), s in zip(caches, segments)
    ]
    x, k, v = decoder_layer.layer_forward(
      config, layer, on, x, positions, own_table, current, tables, visible,
      decoder_layer.lora_of(adapter, gists), gists
    )
    return x, (k, v)

  step = decoder_layer.checkpointed(step, remat)
  if isinstance(params["layers"], dict):
    scanned = (params["layers"], kinds, caches, adapter)
    x, (keys, values) = jax.lax.scan(step, x, scanned)
  else:
    new = []
    for i, layer in enumerate(params["layers"]):
      on = kinds.at(i)
      read = jax.tree.map(lambda a, i=i: a[i], adapter)
      held = [(k[i], v[i], None if bias is None else bias[i])
              for k, v, bias in caches]
      x, own = step(x, (layer, on, held, read))
      new.append(own)
    keys, values = (jnp.stack(parts) for parts in zip(*new))
  hidden = decoder_layer.rms_norm(x, params["final_norm"], config.rms_norm_eps)
  return hidden, keys, values


def forward_branches(
  params,
  config: DecoderConfig,
  trunk: Float[Array, "S D"],
  trunk_positions: Int[Array, " S"],
  branches: Float[Array, "n T D"],
  positions: Int[Array, "n T"],
  visible: Bool[Array, "n S"],
  remat: str = "none",
  gists: Bool[Array, " S"] | None = None,
) -> tuple[Float[jax.Array, "n T D"], Float[jax.Array, "L K S H"],
           Float[jax.Array, "L K S H"]]:
  """Runs a trunk and many branches that attend to it, in one pass.

  As `forward` on the trunk and then on every branch with the trunk as its
  segment, but with all rows in the same products.

  Args:
    params: parameter pytree with stacked layers.
    config: static configuration.
    trunk: [S, D] input embeddings; reads itself, causally.
    trunk_positions: [S] int32.
    branches: [n, T, D] input embeddings; a branch reads what it sees of the
      trunk and itself.
    positions: [n, T] int32.
    visible: [n, S] bool, entries of the trunk that a branch sees.
    remat: see `forward`.
    gists: [S] bool, entries of the trunk that are gists, see `forward`.

  Returns:
    hidden [n, T, D] of the branches after the final norm, and the trunk's
    rotated keys and its values, each [L, K, S, H].
  """
  size = trunk.shape[0]
  n, t, _ = branches.shape
  trunk_table = rotation.rope_tables(config, trunk_positions)
  tables = jax.vmap(lambda p: rotation.rope_tables(config, p))(positions)
  kinds = rotation.layer_kinds(config)
  whole = jnp.ones((size,), bool)
  own_visible = jnp.ones((t,), bool)
  rows = None
  if gists is not None:
    rows = jnp.concatenate([gists, jnp.zeros((n * t,), bool)])

  def step(x, scanned):
    layer, on, adapter = scanned
    if adapter is not None and gists is not None:
      x = x.at[:size].set(decoder_layer.adapt(adapter, x[:size], gists))
    lora = decoder_layer.lora_of(adapter, gists)
    q, k, v = decoder_layer.project(config, layer, x, lora, rows)
    keys, values = rotation.turn(k[:, :size], trunk_table, on), v[:, :size]

    def branch(q, k, v, positions, table, visible):
      return decoder_layer.attend(
        config, decoder_layer.turn_queries(q, table, on),
        [(keys, values, trunk_positions, visible, True, None),
         (k, v, positions, own_visible, False, None)],
        [None, table], positions, on)

    below = decoder_layer.attend(
      config, decoder_layer.turn_queries(q[:size], trunk_table, on),
      [(keys, values, trunk_positions, whole, True, None)], [None],
      trunk_positions, on)
    q, k, v = (
      q[size:].reshape((n, t) + q.shape[1:]),
      *(a[:, size:].reshape(a.shape[0], n, t, -1).transpose(1, 0, 2, 3)
        for a in (k, v)))
    above = jax.vmap(branch)(q, k, v, positions, tables, visible)
    mixed = jnp.concatenate([below, above.reshape((n * t,) + below.shape[1:])])
    return (decoder_layer.finish(config, layer, x, mixed, lora, rows),
            (keys, values))

  step = decoder_layer.checkpointed(step, remat)
  x = jnp.concatenate([trunk, branches.reshape(n * t, -1)])
  x, (keys, values) = jax.lax.scan(
    step, x, (params["layers"], kinds, params.get("gist_adapter")))
  hidden = decoder_layer.rms_norm(
    x[size:], params["final_norm"], config.rms_norm_eps)
  return hidden.reshape(n, t, -1), keys, values


def unstacked(params):
  """The same parameters with a tuple of layers, which `forward` unrolls.

  A scan copies every layer's weights before it multiplies them, on CPU; that
  doubles the time of a step that is bound by memory. There the layers come
  as views, uncopied. Elsewhere, and across devices, params come back as they
  are.
  """
  stacked = params["layers"]
  leaves = jax.tree.leaves(stacked)
  if any(
    len(a.devices()) > 1 or next(iter(a.devices())).platform != "cpu"
    for a in leaves
  ):
    return params
  views = {key: np.asarray(a) for key, a in stacked.items()}
  layers = tuple(
    {key: jax.device_put(view[i]) for key, view in views.items()}
    for i in range(len(leaves[0]))
  )
  return {**params, "layers": layers}


def token_nll(
  params, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
) -> Float[jax.Array, " T"]:
  """Negative log likelihood [T] in nats of targets [T] given hidden [T, D]."""
  logits = unembed(params, hidden)
  picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


@functools.partial(jax.jit, static_argnames="config")
def logits(
  params, config: DecoderConfig, token_ids: Int[Array, " T"]
) -> Float[jax.Array, "T V"]:
  """Plain causal logits [T, V] for ids [T]: the parity reference."""
  positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
  hidden, _, _ = forward(params, config, embed(params, token_ids), positions)
  return unembed(params, hidden)


def sample(
  logits: Float[Array, " V"],
  temperature: Float[Array, ""],
  key: Key[jax.Array, ""],
) -> Int[jax.Array, ""]:
  """Token id from logits [V]: greedy at temperature 0, else categorical."""
  def noisy():
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jnp.argmax(logits + temperature * noise)

  token = jax.lax.cond(temperature > 0, noisy, lambda: jnp.argmax(logits))
  return token.astype(jnp.int32)
