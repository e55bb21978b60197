"""The frozen decoder: plain functions over a parameter pytree.

A Llama-family decoder that takes embeddings, explicit positions and explicit
key/value segments, so that a working context can hold gists beside tokens and
keep its keys in any physical order. Attention between a query at position p
and a key at position q is allowed when q <= p and the key is visible; nothing
depends on where a key is stored.

Keys are cached before rotation (RoFormer, arXiv:2104.09864): a span that moves
to another position costs no forward pass.

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

`unstacked` gives the same with a tuple of L layers in place of the stack.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key
import numpy as np

from mcjax.types import Array

REMAT = ("none", "dots", "layer")  # policies of `forward`
_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
_NEGATIVE = -1e30  # masked score: finite, so an all-masked row stays finite


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1 frequency scaling (`rope_type: llama3`)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and switches of a Llama-family decoder; hashable, a jit static."""

  family: str
  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  max_positions: int
  rope_theta: float
  rms_norm_eps: float
  tie_embeddings: bool
  qkv_bias: bool = False
  o_bias: bool = False
  qk_norm: bool = False
  rope_scaling: RopeScaling | None = None
  nope_layers: tuple[int, ...] = ()  # layers without RoPE (SmolLM3)
  # Fields from here on came later; at their defaults no fingerprint has them.
  rope_freqs: tuple[float, ...] | None = None  # in place of rope_theta's
  rope_magnitude: float = 1.0  # of cosines and sines
  local_layers: tuple[int, ...] = ()  # that read the newest positions only
  local_window: int = 0  # positions that a local layer reads, its own included
  local_rope_theta: float | None = None  # of local layers, if another
  qk_norm_whole: bool = False  # one norm over all heads (OLMo 2)
  pre_norm: bool = True  # a block's input is normalised
  post_norm: bool = False  # a block's output is (Gemma 3, OLMo 2)
  act: str = "silu"  # or gelu_tanh

  @property
  def flops_per_token(self) -> int:
    """Multiply-adds x 2 of one token's forward, attention scores excluded."""
    attention = self.d_model * self.head_dim * (
      2 * self.n_heads + 2 * self.n_kv_heads
    )
    layer = attention + 3 * self.d_model * self.d_ff
    return 2 * (self.n_layers * layer + self.d_model * self.vocab_size)


class Segment(NamedTuple):
  """Cached keys and values that queries may attend to.

  Attributes:
    keys: [L, K, S, H], or L arrays [K, S, H]; un-rotated unless `rotated`.
    values: as the keys.
    positions: [S] int32 position of each key.
    visible: [S] bool; False hides the key from every query.
    rotated: whether keys already carry their rotation (a Python bool).
  """

  keys: jax.Array | tuple[jax.Array, ...]
  values: jax.Array | tuple[jax.Array, ...]
  positions: Int[Array, " S"]
  visible: Bool[Array, " S"]
  rotated: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed_product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.einsum(
    spec, x.astype(w.dtype), w, preferred_element_type=x.dtype)


def _mixed_product_forward(spec, x, w):
  return _mixed_product(spec, x, w), (x, w)


def _mixed_product_backward(spec, saved, slope):
  x, w = saved
  operands, out = spec.split("->")
  left, right = operands.split(",")
  short = slope.astype(w.dtype)
  return (
    jnp.einsum(f"{out},{right}->{left}", short, w,
               preferred_element_type=x.dtype),
    jnp.einsum(f"{left},{out}->{right}", x, slope).astype(w.dtype))


_mixed_product.defvjp(_mixed_product_forward, _mixed_product_backward)


def product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """Einsum of activations and weights, in the activations' dtype.

  float32 activations beside bfloat16 weights are rounded for the product,
  whose sums and result are float32, forwards and backwards: the fastest form
  on a CPU with bfloat16 dot products, and an ordinary one elsewhere.
  """
  if x.dtype == w.dtype:
    return jnp.einsum(spec, x, w)
  return _mixed_product(spec, x, w)


def rms_norm(
  x: Float[jax.Array, "... D"], scale: Float[Array, " D"], eps: float
) -> Float[jax.Array, "... D"]:
  """Root-mean-square norm over the last axis, computed in float32."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def rope_tables(
  config: DecoderConfig, positions: Int[Array, " S"]
) -> tuple[Float[jax.Array, "S rotated"], ...]:
  """Cosines and sines [S, R] in float32 for integer positions [S].

  R is half the channels that are rotated. Where local layers turn otherwise,
  their cosines and sines follow.
  """
  angles = positions.astype(jnp.float32)[:, None] * _frequencies(config)[None]
  tables = jnp.cos(angles), jnp.sin(angles)
  if config.rope_magnitude != 1.0:
    tables = tuple(t * config.rope_magnitude for t in tables)
  if config.local_rope_theta is None:
    return tables
  near = _powers(config.local_rope_theta, config.head_dim // 2)
  angles = positions.astype(jnp.float32)[:, None] * near[None]
  return (*tables, jnp.cos(angles), jnp.sin(angles))


def _powers(theta: float, count: int) -> jax.Array:
  exponents = jnp.arange(count, dtype=jnp.float32) / count
  return jnp.exp(-math.log(theta) * exponents)


def _frequencies(config: DecoderConfig) -> jax.Array:
  """Radians a position, [R]."""
  if config.rope_freqs is not None:
    return jnp.array(config.rope_freqs, jnp.float32)
  freqs = _powers(config.rope_theta, config.head_dim // 2)
  s = config.rope_scaling
  if s is None:
    return freqs
  wavelength = 2 * math.pi / freqs
  low = s.original_max_positions / s.low_freq_factor
  high = s.original_max_positions / s.high_freq_factor
  smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (
    s.high_freq_factor - s.low_freq_factor
  )
  mixed = (1 - smooth) * freqs / s.factor + smooth * freqs
  return jnp.where(
    wavelength > low,
    freqs / s.factor,
    jnp.where(wavelength < high, freqs, mixed),
  )


def rotate(
  x: Float[Array, "... S H"],
  cos: Float[Array, "S rotated"],
  sin: Float[Array, "S rotated"],
) -> Float[jax.Array, "... S H"]:
  """Rotates x [..., S, H] by tables [S, R]; half-split convention.

  The first 2 R channels of a head are rotated, the others stay.
  """
  lead = (1,) * (x.ndim - 2)
  cos = cos.reshape(lead + cos.shape)
  sin = sin.reshape(lead + sin.shape)
  turned = 2 * cos.shape[-1]
  wide = x.astype(jnp.float32)
  a, b = jnp.split(wide[..., :turned], 2, axis=-1)
  parts: list[Array] = [a * cos - b * sin, b * cos + a * sin]
  if turned < x.shape[-1]:
    parts.append(wide[..., turned:])
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)


class LayerKinds(NamedTuple):
  """What differs from layer to layer; a field is None where none does.

  Attributes:
    rope: [L] bool, whether a layer rotates queries and keys.
    local: [L] bool, whether it reads the newest positions only.
  """

  rope: jax.Array | None = None
  local: jax.Array | None = None

  def at(self, layer: int) -> LayerKinds:
    """The kinds of one layer."""
    return LayerKinds(*(None if a is None else a[layer] for a in self))


def layer_kinds(config: DecoderConfig) -> LayerKinds:
  """The kinds of all layers."""
  def among(layers, sense: bool) -> jax.Array | None:
    if not layers:
      return None
    return jnp.array(
      [(i in layers) == sense for i in range(config.n_layers)], bool)

  return LayerKinds(
    among(config.nope_layers, False), among(config.local_layers, True))


def rotate_keys(
  config: DecoderConfig,
  keys: Float[Array, "L K S H"],
  positions: Int[Array, " S"],
) -> Float[jax.Array, "L K S H"]:
  """Rotates a cache [L, K, S, H] to `positions` [S], once for many queries."""
  tables = rope_tables(config, positions)
  # A loop over layers: else XLA fuses the cosines into the rotation and
  # computes each of them anew for every layer and head.
  return jax.lax.map(
    lambda layer: turn(layer[1], tables, layer[0]), (layer_kinds(config), keys))


def turn(x: jax.Array, table: tuple[jax.Array, ...], kind: LayerKinds
         ) -> jax.Array:
  """Rotates x [..., S, H] as a layer of this kind does, by its table."""
  cos, sin = table[:2]
  if len(table) > 2 and kind.local is not None:
    cos, sin = (jnp.where(kind.local, near, far)
                for near, far in zip(table[2:], table[:2]))
  turned = rotate(x, cos, sin)
  return turned if kind.rope is None else jnp.where(kind.rope, turned, x)


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


def _attend(config, query, segments, tables, q_positions, kind):
  """Softmax attention of query [T, N, H] over all segments; returns [T, N, H].

  `segments` are (keys [K, S, H], values [K, S, H], positions, visible,
  rotated) for this layer; `tables` the matching rope tables (None if rotated).
  The products are plain batched matrix products over [T * G] rows, the form
  that XLA compiles best on every platform, one row included.
  """
  t, n, h = query.shape
  k_heads = config.n_kv_heads
  groups = n // k_heads
  q = query.reshape(t, k_heads, groups, h).transpose(1, 0, 2, 3)
  q = q.reshape(k_heads, t * groups, h)
  scores = []
  for (keys, _, positions, visible, _), table in zip(segments, tables):
    if table is not None:
      keys = turn(keys, table, kind)
    s = jnp.einsum("kmh,ksh->kms", q, keys, preferred_element_type=jnp.float32)
    ahead = q_positions[:, None] - positions[None, :]
    allowed = (ahead >= 0) & visible[None, :]
    if kind.local is not None:
      allowed &= (ahead < config.local_window) | ~kind.local
    s = s.reshape(k_heads, t, groups, keys.shape[1]) / math.sqrt(h)
    scores.append(jnp.where(allowed[None, :, None], s, _NEGATIVE))
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  weights = weights.reshape(k_heads, t * groups, weights.shape[-1])
  parts, offset = [], 0
  for keys, values, *_ in segments:
    size = keys.shape[1]
    w = weights[..., offset : offset + size].astype(values.dtype)
    parts.append(jnp.einsum("kms,ksh->kmh", w, values))
    offset += size
  out = functools.reduce(operator.add, parts)
  out = out.reshape(k_heads, t, groups, h).transpose(1, 0, 2, 3)
  return out.reshape(t, n, h)


def _project(config, layer, x):
  """Un-rotated queries [T, N, H], keys and values [K, T, H] of x [T, D]."""
  y = x
  if config.pre_norm:
    y = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
  q = product("td,dnh->tnh", y, layer["wq"])
  k = product("td,dkh->tkh", y, layer["wk"])
  v = product("td,dkh->tkh", y, layer["wv"])
  if config.qkv_bias:
    q = q + layer["bq"][None].astype(q.dtype)
    k = k + layer["bk"][None].astype(k.dtype)
    v = v + layer["bv"][None].astype(v.dtype)
  if config.qk_norm:
    q = _norm_heads(config, q, layer["q_norm"])
    k = _norm_heads(config, k, layer["k_norm"])
  return q, k.transpose(1, 0, 2), v.transpose(1, 0, 2)


def _norm_heads(config, x, scale):
  """Norm of queries or keys x [T, heads, H]: each head's, or all in one."""
  if not config.qk_norm_whole:
    return rms_norm(x, scale, config.rms_norm_eps)
  flat = rms_norm(
    x.reshape(x.shape[0], -1), scale.reshape(-1), config.rms_norm_eps)
  return flat.reshape(x.shape)


def _turn_queries(q, table, kind):
  return turn(q.transpose(1, 0, 2), table, kind).transpose(1, 0, 2)


def _finish(config, layer, x, mixed):
  """The layer's output [T, D] from its input and attention [T, N, H]."""
  # One contracted axis: over two, XLA CPU transposes the weights every time.
  wo = layer["wo"].reshape(-1, config.d_model)
  out = product("ta,ad->td", mixed.reshape(-1, wo.shape[0]), wo)
  if config.o_bias:
    out = out + layer["bo"][None].astype(out.dtype)
  if config.post_norm:
    out = rms_norm(out, layer["attn_post_norm"], config.rms_norm_eps)
  x = x + out
  y = x
  if config.pre_norm:
    y = rms_norm(x, layer["mlp_norm"], config.rms_norm_eps)
  gate = product("td,df->tf", y, layer["w_gate"])
  gated = _ACTIVATIONS[config.act](gate)
  gated = gated * product("td,df->tf", y, layer["w_up"])
  out = product("tf,fd->td", gated, layer["w_down"])
  if config.post_norm:
    out = rms_norm(out, layer["mlp_post_norm"], config.rms_norm_eps)
  return x + out


def _checkpointed(step, remat: str):
  """A layer whose backward pass computes some of it again."""
  if remat == "none":
    return step
  policy = None
  if remat == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(step, policy=policy)


def _adapt(adapter, x, gists):
  """A layer's input x [T, D] where rows `gists` [T] pass through its adapter.

  The adapter shows the layer a gist at another scale and offset of every
  channel and, where it has "down" and "up", with a low-rank map of it added;
  the rows of tokens stay what they are, to the last bit.
  """
  if adapter is None or gists is None:
    return x
  gain, shift = adapter["gain"][None], adapter["shift"][None]
  wide = x.astype(jnp.float32)
  read = wide * (1 + gain) + shift
  if "down" in adapter:
    size = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    read += wide / size @ adapter["down"] @ adapter["up"]
  return jnp.where(gists[:, None], read.astype(x.dtype), x)


def _layer(config, layer, kind, x, positions, own_table, segments, tables,
           own_visible):
  """One decoder layer on x [T, D]; returns x and its new keys and values."""
  q, k, v = _project(config, layer, x)
  own = (k, v, positions, own_visible, False)
  mixed = _attend(
    config, _turn_queries(q, own_table, kind), [*segments, own],
    [*tables, own_table], positions, kind)
  return _finish(config, layer, x, mixed), k, v


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
  own_table = rope_tables(config, positions)
  tables = [
    None if s.rotated else rope_tables(config, s.positions) for s in segments
  ]
  kinds = layer_kinds(config)
  caches = [(s.keys, s.values) for s in segments]
  adapter = params.get("gist_adapter")

  def step(x, scanned):
    layer, on, caches, adapter = scanned
    x = _adapt(adapter, x, gists)
    current = [
      (k, v, s.positions, s.visible, s.rotated)
      for (k, v), s in zip(caches, segments)
    ]
    x, k, v = _layer(
      config, layer, on, x, positions, own_table, current, tables, visible
    )
    return x, (k, v)

  step = _checkpointed(step, remat)
  if isinstance(params["layers"], dict):
    scanned = (params["layers"], kinds, caches, adapter)
    x, (keys, values) = jax.lax.scan(step, x, scanned)
  else:
    new = []
    for i, layer in enumerate(params["layers"]):
      on = kinds.at(i)
      read = adapter and {name: a[i] for name, a in adapter.items()}
      x, own = step(x, (layer, on, [(k[i], v[i]) for k, v in caches], read))
      new.append(own)
    keys, values = (jnp.stack(parts) for parts in zip(*new))
  hidden = rms_norm(x, params["final_norm"], config.rms_norm_eps)
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
  trunk_table = rope_tables(config, trunk_positions)
  tables = jax.vmap(lambda p: rope_tables(config, p))(positions)
  kinds = layer_kinds(config)
  whole = jnp.ones((size,), bool)
  own_visible = jnp.ones((t,), bool)

  def step(x, scanned):
    layer, on, adapter = scanned
    if adapter is not None and gists is not None:
      x = x.at[:size].set(_adapt(adapter, x[:size], gists))
    q, k, v = _project(config, layer, x)
    keys, values = turn(k[:, :size], trunk_table, on), v[:, :size]

    def branch(q, k, v, positions, table, visible):
      return _attend(
        config, _turn_queries(q, table, on),
        [(keys, values, trunk_positions, visible, True),
         (k, v, positions, own_visible, False)],
        [None, table], positions, on)

    below = _attend(
      config, _turn_queries(q[:size], trunk_table, on),
      [(keys, values, trunk_positions, whole, True)], [None],
      trunk_positions, on)
    q, k, v = (
      q[size:].reshape((n, t) + q.shape[1:]),
      *(a[:, size:].reshape(a.shape[0], n, t, -1).transpose(1, 0, 2, 3)
        for a in (k, v)))
    above = jax.vmap(branch)(q, k, v, positions, tables, visible)
    mixed = jnp.concatenate([below, above.reshape((n * t,) + below.shape[1:])])
    return _finish(config, layer, x, mixed), (keys, values)

  step = _checkpointed(step, remat)
  x = jnp.concatenate([trunk, branches.reshape(n * t, -1)])
  x, (keys, values) = jax.lax.scan(
    step, x, (params["layers"], kinds, params.get("gist_adapter")))
  hidden = rms_norm(x[size:], params["final_norm"], config.rms_norm_eps)
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
