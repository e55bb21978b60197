"""One layer of the frozen decoder: projections, attention, MLP, adapter."""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mcjax.base import fused_attention
from mcjax.base.rotation import turn
from mcjax.types import Array

_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
NEGATIVE = -1e30  # masked score: finite, so an all-masked row stays finite


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


def attend(config, query, segments, tables, q_positions, kind):
  """Softmax attention of query [T, N, H] over all segments; returns [T, N, H].

  `segments` are (keys [K, S, H], values [K, S, H], positions, visible,
  rotated, bias [K, S] or None) for this layer; `tables` the matching rope
  tables (None if rotated).
  The products are plain batched matrix products over [T * G] rows, the form
  that XLA compiles best on every platform, one row included. Another way is
  `config.attention`, see `fused_attention`.
  """
  if config.attention != "plain":
    return fused_attention.attend(
      config, query, segments, tables, q_positions, kind)
  t, n, h = query.shape
  k_heads = config.n_kv_heads
  groups = n // k_heads
  q = query.reshape(t, k_heads, groups, h).transpose(1, 0, 2, 3)
  q = q.reshape(k_heads, t * groups, h)
  scores = []
  for (keys, _, positions, visible, _, bias), table in zip(segments, tables):
    if table is not None:
      keys = turn(keys, table, kind)
    s = jnp.einsum("kmh,ksh->kms", q, keys, preferred_element_type=jnp.float32)
    allowed = fused_attention.sees(
      config, kind, q_positions, positions, visible)
    s = s.reshape(k_heads, t, groups, keys.shape[1]) / math.sqrt(h)
    if bias is not None:
      s = s + bias[:, None, None]
    scores.append(jnp.where(allowed[None, :, None], s, NEGATIVE))
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


def project(config, layer, x, lora=None, rows=None):
  """Un-rotated queries [T, N, H], keys and values [K, T, H] of x [T, D].

  `lora` adds low-rank maps at `rows` [T], see `low_rank`.
  """
  y = x
  if config.pre_norm:
    y = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
  q = product("td,dnh->tnh", y, layer["wq"])
  k = product("td,dkh->tkh", y, layer["wk"])
  v = product("td,dkh->tkh", y, layer["wv"])
  if lora is not None:
    q, k, v = (a + low_rank(lora[name], y, rows)
               for name, a in (("q", q), ("k", k), ("v", v)))
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


def turn_queries(q, table, kind):
  return turn(q.transpose(1, 0, 2), table, kind).transpose(1, 0, 2)


def low_rank(pair, x, rows):
  """What a low-rank map adds (LoRA, arXiv:2106.09685).

  Args:
    pair: "a" [width, r] and "b" [r, …].
    x: [T, width].
    rows: [T] bool; zero at the others.

  Returns:
    [T, …] in the dtype of x.
  """
  a, b = pair["a"], pair["b"]
  out = x.astype(a.dtype) @ a @ b.reshape(b.shape[0], -1)
  out = jnp.where(rows[:, None], out, 0).astype(x.dtype)
  return out.reshape(x.shape[:1] + b.shape[1:])


def finish(config, layer, x, mixed, lora=None, rows=None):
  """The layer's output [T, D] from its input and attention [T, N, H].

  `lora` and `rows` are as for `project`.
  """
  # One contracted axis: over two, XLA CPU transposes the weights every time.
  wo = layer["wo"].reshape(-1, config.d_model)
  flat = mixed.reshape(-1, wo.shape[0])
  out = product("ta,ad->td", flat, wo)
  if lora is not None:
    out = out + low_rank(lora["o"], flat, rows)
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


def checkpointed(step, remat: str):
  """A layer whose backward pass computes some of it again."""
  if remat == "none":
    return step
  policy = None
  if remat == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(step, policy=policy)


def adapt(adapter, x, gists):
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


def lora_of(adapter, gists):
  """The adapter's low-rank maps of the attention; None where there are none."""
  return None if adapter is None or gists is None else adapter.get("lora")


def layer_forward(config, layer, kind, x, positions, own_table, segments,
                  tables, own_visible, lora=None, rows=None):
  """One decoder layer on x [T, D]; returns x and its new keys and values."""
  q, k, v = project(config, layer, x, lora, rows)
  own = (k, v, positions, own_visible, False, None)
  mixed = attend(
    config, turn_queries(q, own_table, kind), [*segments, own],
    [*tables, own_table], positions, kind)
  return finish(config, layer, x, mixed, lora, rows), k, v
