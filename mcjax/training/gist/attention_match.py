"""Layer-local distillation: gists that answer the teacher's own queries.

The teacher's queries, kept from its pass over the full window, attend in every
layer to the gists' keys and values and to their own segment's. The error of
the attention output against the teacher's, relative to the residual stream it
is added to, is the loss. Only the gists, a thirty-second of the tokens, are
decoded with a gradient, so a window costs a third of the end-to-end loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mcjax.base import model, rotation
from mcjax.base.decoder_layer import product, rms_norm
from mcjax.types import McjaxError


class Trace(NamedTuple):
  """What the teacher's pass leaves behind, one row a layer.

  Attributes:
    queries: [L, T, N, H] un-rotated.
    keys, values: [L, K, T, H] un-rotated.
    outputs: [L, T, D] what attention adds to the residual stream.
    scale: [L, T] mean square of the residual stream after that.
  """

  queries: jax.Array
  keys: jax.Array
  values: jax.Array
  outputs: jax.Array
  scale: jax.Array


def _attention(query, keys, values, allowed):
  """Grouped softmax attention: [T, N, H] over [K, S, H] → [T, N, H]."""
  t, n, h = query.shape
  k = keys.shape[0]
  scores = jnp.einsum("tkgh,ksh->kgts", query.reshape(t, k, n // k, h), keys,
                      preferred_element_type=jnp.float32) / math.sqrt(h)
  weights = jax.nn.softmax(
    jnp.where(allowed[None, None], scores, -1e30), axis=-1)
  return jnp.einsum("kgts,ksh->tkgh", weights.astype(values.dtype),
                    values).reshape(t, n, h)


def covers(config: model.DecoderConfig) -> bool:
  """Whether `trace` computes this decoder: a plain Llama."""
  return not (
    config.nope_layers or config.qkv_bias or config.qk_norm or config.o_bias
    or config.local_layers or config.post_norm or config.act != "silu")


def trace(params, config: model.DecoderConfig, x: jax.Array
          ) -> tuple[jax.Array, Trace]:
  """Causal pass over embeddings [T, D]: final hidden [T, D] and its trace.

  Raises:
    McjaxError: layers without rotation, biases or query norms.
  """
  if not covers(config):
    raise McjaxError("Objective.attend covers plain Llama layers only, not "
                     f"those of a {config.family}; leave it at 0")
  places = jnp.arange(x.shape[0], dtype=jnp.int32)
  table = rotation.rope_tables(config, places)
  allowed = places[None, :] <= places[:, None]

  def step(x, layer):
    y = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
    q = product("td,dnh->tnh", y, layer["wq"])
    k = product("td,dkh->kth", y, layer["wk"])
    v = product("td,dkh->kth", y, layer["wv"])
    turned = rotation.rotate(q.transpose(1, 0, 2), *table).transpose(1, 0, 2)
    mixed = _attention(turned, rotation.rotate(k, *table), v, allowed)
    out = product("tnh,nhd->td", mixed, layer["wo"])
    x = x + out
    scale = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1)
    y = rms_norm(x, layer["mlp_norm"], config.rms_norm_eps)
    gate = product("td,df->tf", y, layer["w_gate"])
    gated = jax.nn.silu(gate) * product("td,df->tf", y, layer["w_up"])
    x = x + product("tf,fd->td", gated, layer["w_down"])
    return x, Trace(q, k, v, out, scale)

  x, rows = jax.lax.scan(step, x, params["layers"])
  return rms_norm(x, params["final_norm"], config.rms_norm_eps), rows


def loss(params, config: model.DecoderConfig, rows: Trace,
         far_keys: jax.Array, far_values: jax.Array, index: jax.Array,
         places: jax.Array, visible: jax.Array, weights: jax.Array
         ) -> jax.Array:
  """Relative squared error of attention outputs, averaged over layers.

  Args:
    params: the decoder's parameters.
    config: its configuration.
    rows: the teacher's trace.
    far_keys, far_values: of the gists, keys rotated, [L, K, S, H].
    index: [segments, H] window positions of the segments' tokens.
    places: [segments, H] their positions beside the gists.
    visible: [segments, S] gists that each segment sees.
    weights: [segments, H] of the tokens; sums to 1.
  """
  own = places[:, None, :] <= places[:, :, None]
  allowed = jnp.concatenate([
    jnp.broadcast_to(visible[:, None], own.shape[:2] + visible.shape[1:]), own],
    axis=-1)
  tables = jax.vmap(lambda p: rotation.rope_tables(config, p))(places)

  def layer(total, scanned):
    row, far_keys, far_values, wo = scanned

    def one(index, table, allowed):
      q = rotation.rotate(row.queries[index].transpose(1, 0, 2), *table)
      keys = rotation.rotate(row.keys[:, index], *table)
      return _attention(
        q.transpose(1, 0, 2), jnp.concatenate([far_keys, keys], axis=1),
        jnp.concatenate([far_values, row.values[:, index]], axis=1), allowed)

    found = jax.vmap(one)(index, tables, allowed)
    error = product("sthe,hed->std", found, wo) - row.outputs[index]
    error = jnp.mean(jnp.square(error.astype(jnp.float32)), axis=-1)
    return total + jnp.sum(error / row.scale[index] * weights), None

  total, _ = jax.lax.scan(
    layer, jnp.float32(0),
    (rows, far_keys, far_values, params["layers"]["wo"]))
  return total / config.n_layers
