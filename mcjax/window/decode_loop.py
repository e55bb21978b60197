"""The device loop that decodes a block of up to 32 tokens in many rows.

Every row has a view of its window: the keys that the LM attends to, rotated,
and their values, side by side in a fixed capacity. All sizes are fixed;
lengths, places and settings travel as arrays.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.base import decoder_layer, model, rotation
from mcjax.types import BRANCHING, Array
from mcjax.window import sampling
from mcjax.window.kv_slots import KVSlots

LIKELY = 20  # tokens listed beside the one drawn, at most
_PLAUSIBLE = 0.1  # of the likeliest token's probability, to be picked at all


class View(NamedTuple):
  """What rows attend to, layer by layer.

  Attributes:
    keys: [B, K, H, C] each, rotated to their positions; channels first, which
      halves the time of a row's scores on a CPU.
    values: [B, K, C, H] each.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


class Sight(NamedTuple):
  """Where the entries of a view stand.

  Attributes:
    positions: [B, C] int32.
    used: [B] int32, entries that are visible; the rest is free.
    first: [B] int32 position of the first new token.
    logits: [B, V] float32 for it.
  """

  positions: Array
  used: Array
  first: Array
  logits: Array


class Block(NamedTuple):
  """What a device loop has made; [B] rows, 32 columns valid up to `count`.

  Attributes:
    tokens: [B, 32] int32.
    logprobs: [B, 32] float32, of each token before temperature and cuts.
    likely: [B, 32, 20] int32, the likeliest tokens instead, where asked for.
    likely_logprobs: [B, 32, 20] float32.
    count: [B] int32.
    stopped: [B] bool, the last token is a stop token.
    inputs: [B, 32, D] embeddings.
    keys, values: for each stream a tuple over layers of [B, K, 32, H], keys
      un-rotated.
    logits: for each stream [B, V] for the token after the last one.
    seen: [B, V] bool.
  """

  tokens: jax.Array
  logprobs: jax.Array
  likely: jax.Array
  likely_logprobs: jax.Array
  count: jax.Array
  stopped: jax.Array
  inputs: jax.Array
  keys: tuple[tuple[jax.Array, ...], ...]
  values: tuple[tuple[jax.Array, ...], ...]
  logits: tuple[jax.Array, ...]
  seen: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "rows", "capacity",
                                             "dtype"))
def empty_view(config, rows, capacity, dtype):
  heads, layers = (rows, config.n_kv_heads), range(config.n_layers)
  keys, values = ((*heads, config.head_dim, capacity),
                  (*heads, capacity, config.head_dim))
  return View(tuple(jnp.zeros(keys, dtype) for _ in layers),
              tuple(jnp.zeros(values, dtype) for _ in layers))


@functools.partial(jax.jit, static_argnames="config")
def rope_of(config, positions):
  # A program of its own: else the cosines are fused into every rotation.
  return rotation.rope_tables(config, positions)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def gather(config, view, state, slots, tables, row):
  """The view with slots [C] of a window's state in one row."""
  keys = jnp.take(state.keys, slots, axis=2, mode="clip")
  values = jnp.take(state.values, slots, axis=2, mode="clip")
  # All layers at once: one by one they are much more to compile.
  keys = jax.vmap(rotation.turn, in_axes=(0, None, 0))(
    keys, tables, rotation.layer_kinds(config))

  def put(old, new):
    return tuple(
      jax.lax.dynamic_update_slice(a, b[None], (row, 0, 0, 0))
      for a, b in zip(old, new))

  return View(put(view.keys, keys.swapaxes(2, 3)), put(view.values, values))


@functools.partial(jax.jit, static_argnames="stream", donate_argnums=0)
def store(state, block, row, slots, stream):
  """The state with a row's new tokens in slots [32]; S drops padding."""
  def put(old, new):
    new = jnp.stack([jax.lax.dynamic_index_in_dim(a, row, 0, False)
                     for a in new])
    return old.at[:, :, slots].set(new, mode="drop")

  inputs = jax.lax.dynamic_index_in_dim(block.inputs, row, 0, False)
  return KVSlots(
    state.inputs.at[slots].set(inputs, mode="drop"),
    put(state.keys, block.keys[stream]),
    put(state.values, block.values[stream]))


@jax.jit
def stacked(rows):
  return jnp.stack(rows)


@functools.partial(jax.jit, donate_argnums=0)
def with_row(rows, row, at):
  """Rows [B, V] with `row` [V] in place of number `at`."""
  return jax.lax.dynamic_update_slice(rows, row[None], (at, 0))


def _layers(params, config):
  layers = params["layers"]
  if isinstance(layers, dict):
    return [{name: a[i] for name, a in layers.items()}
            for i in range(config.n_layers)]
  return layers


def _forward(params, config, x, streams, own, i):
  """One token of every row of every stream.

  Args:
    x: [M * B, D], the streams' rows below each other.
    streams: (view, sight) of each of M streams.
    own: for each stream and layer the block's keys [B, K, 32, H], turned keys
      [B, K, H, 32] and values [B, K, 32, H] so far.
    i: the token's number in the block.

  Returns:
    hidden [M * B, D], and `own` with the token in it.
  """
  rows = streams[0][1].first.shape[0]
  at = jnp.concatenate([sight.first for _, sight in streams]) + i
  table = rotation.rope_tables(config, at)
  kinds, sees = rotation.layer_kinds(config), [
    _allowed(config, sight, i) for _, sight in streams]
  out = [[] for _ in streams]
  for n, layer in enumerate(_layers(params, config)):
    q, k, v = decoder_layer.project(config, layer, x)
    turned, kind = k, kinds.at(n)._replace(rope=None)
    if n not in config.nope_layers:
      q = decoder_layer.turn_queries(q, table, kind)
      turned = rotation.turn(k, table, kind)
    parts = []
    for m, (view, _) in enumerate(streams):
      mine = slice(m * rows, (m + 1) * rows)
      held = _put(own[m][n], k[:, mine], turned[:, mine], v[:, mine], i)
      out[m].append(held)
      parts.append(_mix(config, kind, q[mine], view.keys[n], view.values[n],
                        held, sees[m]))
    x = decoder_layer.finish(config, layer, x, jnp.concatenate(parts))
  hidden = decoder_layer.rms_norm(x, params["final_norm"], config.rms_norm_eps)
  return hidden, tuple(tuple(layers) for layers in out)


def _put(held, k, turned, v, i):
  """Keys, turned keys and values of a block with those [K, B, H] of token i."""
  keys, turned_keys, values = held
  put = jax.lax.dynamic_update_slice
  k, turned, v = (a.transpose(1, 0, 2) for a in (k, turned, v))
  return (put(keys, k[:, :, None], (0, 0, i, 0)),
          put(turned_keys, turned[..., None], (0, 0, 0, i)),
          put(values, v[:, :, None], (0, 0, i, 0)))


def _allowed(config, sight, i):
  """What token i of a block may read, [B, C] and [B, 32] bool; far and near."""
  place = (sight.first + i)[:, None]
  capacity = sight.positions.shape[1]
  offsets = jnp.arange(BRANCHING, dtype=jnp.int32)[None]
  kept = jnp.arange(capacity, dtype=jnp.int32)[None] < sight.used[:, None]
  view, block = kept & (sight.positions <= place), offsets <= i
  block = jnp.broadcast_to(block, (place.shape[0], BRANCHING))
  if not config.local_layers:
    return (view, block), None
  near = view & (place - sight.positions < config.local_window)
  return (view, block), (near, block & (i - offsets < config.local_window))


def _mix(config, kind, q, keys, values, held, sees):
  """Attention [B, N, H] of each row's query to its view and its block."""
  rows, heads, size = q.shape
  _, turned, new_values = held
  q = q.reshape(rows, config.n_kv_heads, -1, size)
  scores = []
  for part, (k, far) in enumerate(zip((keys, turned), sees[0])):
    allowed = far
    if sees[1] is not None:
      allowed = jnp.where(kind.local, sees[1][part], far)
    s = jnp.einsum("bkmh,bkhs->bkms", q, k, preferred_element_type=jnp.float32)
    scores.append(jnp.where(
      allowed[:, None, None], s / math.sqrt(size), decoder_layer.NEGATIVE))
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  split = keys.shape[-1]
  far, near = (
    jnp.einsum("bkms,bksh->bkmh", w.astype(v.dtype), v)
    for w, v in ((weights[..., :split], values),
                 (weights[..., split:], new_values)))
  return (far + near).reshape(rows, heads, size)


def _against(logits, prior, weight, on):
  """Logits [B, V] by context-aware decoding, in rows that are `on`: those of
  plausible tokens, and the more the likelier the text makes them."""
  beside, without = jax.nn.log_softmax(logits), jax.nn.log_softmax(prior)
  top = jnp.max(beside, axis=-1, keepdims=True)
  held = jnp.where(beside >= top + math.log(_PLAUSIBLE),
                   beside + weight[:, None] * (beside - without), -jnp.inf)
  return jnp.where(on[:, None], held, logits)


@functools.partial(
  jax.jit, static_argnames="config", donate_argnames=("views", "seen"))
def decode_rows(params, config: model.DecoderConfig, views: tuple[View, ...],
                sights: tuple[Sight, ...], limit: jax.Array,
                stop_ids: jax.Array, rows: sampling.Rows, seen: jax.Array,
                weight: jax.Array, on: jax.Array, listed: jax.Array
                ) -> tuple[tuple[View, ...], Block]:
  """Decodes up to `limit` [B] <= 32 tokens a row, without a host sync.

  Args:
    params: the frozen base's parameters.
    config: static.
    views: donated; of the windows and, where any row is held against what the
      LM says without the text it reads, of the same without.
    sights: of the views.
    limit: [B] int32 tokens wanted; 0 leaves a row alone.
    stop_ids: [8] int32, -1 pads; a row ends after one of them.
    rows: how each row samples; its `seen` is not read.
    seen: donated, see `sampling.Rows`.
    weight: [B] float32, how much what the text adds counts beyond itself.
    on: [B] bool, rows that are held against anything.
    listed: [] bool, whether the likeliest tokens are asked for.

  Returns:
    The views with the new tokens in them, and a `Block`.
  """
  count = limit.shape[0]
  size = BRANCHING
  view = views[0]
  heads, dtype = (count, config.n_kv_heads), view.keys[0].dtype
  tall = jnp.zeros((*heads, size, config.head_dim), dtype)
  wide = jnp.zeros((*heads, config.head_dim, size), dtype)
  first = {
    "i": jnp.int32(0), "stopped": limit <= 0,
    "count": jnp.zeros(count, jnp.int32),
    "tokens": jnp.zeros((count, size), jnp.int32),
    "logprobs": jnp.zeros((count, size), jnp.float32),
    "likely": jnp.zeros((count, size, LIKELY), jnp.int32),
    "likely_logprobs": jnp.zeros((count, size, LIKELY), jnp.float32),
    "inputs": jnp.zeros((count, size, config.d_model), dtype),
    "logits": tuple(s.logits for s in sights), "seen": seen,
    "own": (((tall, wide, tall),) * config.n_layers,) * len(views),
  }

  def step(c):
    i, going = c["i"], ~c["stopped"] & (c["i"] < limit)
    found = c["logits"][0]
    if len(views) > 1:
      found = _against(found, c["logits"][1], weight, on)
    token = sampling.draw(rows._replace(seen=c["seen"]), found, i)
    spread = jax.nn.log_softmax(found)
    logprob = jnp.take_along_axis(spread, token[:, None], axis=-1)[:, 0]
    best = jax.lax.cond(listed, _likeliest, _unlisted, spread)
    x = model.embed(params, token)
    hidden, own = _forward(
      params, config, jnp.concatenate([x] * len(views)),
      list(zip(views, sights)), c["own"], i)
    logits = model.unembed(params, hidden).reshape(len(views), count, -1)
    fresh = tuple(jnp.where(going[:, None], new, old)
                  for new, old in zip(logits, c["logits"]))
    at = jnp.arange(count)
    return {
      "i": i + 1,
      "stopped": c["stopped"] | jnp.any(
        token[:, None] == stop_ids[None], axis=-1),
      "count": c["count"] + going.astype(jnp.int32),
      "tokens": c["tokens"].at[:, i].set(token),
      "logprobs": c["logprobs"].at[:, i].set(logprob),
      "likely": c["likely"].at[:, i].set(best[1]),
      "likely_logprobs": c["likely_logprobs"].at[:, i].set(best[0]),
      "inputs": jax.lax.dynamic_update_slice(
        c["inputs"], x[:, None], (0, i, 0)),
      "logits": fresh,
      "seen": c["seen"].at[at, token].max(going),
      "own": own,
    }

  def unfinished(c):
    return jnp.any(~c["stopped"] & (c["i"] < limit))

  # A row that has ended idles: what it makes then is beyond its count.
  c: dict[str, Any] = jax.lax.while_loop(unfinished, step, first)
  stopped = jnp.any(
    (c["tokens"][:, :, None] == stop_ids[None, None])
    & (jnp.arange(size)[None, :] < c["count"][:, None])[:, :, None],
    axis=(1, 2))

  views = tuple(
    View(tuple(_behind(old, new[1], s.used, 2)
               for old, new in zip(v.keys, own)),
         tuple(_behind(old, new[2], s.used, 1)
               for old, new in zip(v.values, own)))
    for v, s, own in zip(views, sights, c["own"]))
  keys, values = (tuple(tuple(layer[part] for layer in own)
                        for own in c["own"]) for part in (0, 2))
  return views, Block(
    c["tokens"], c["logprobs"], c["likely"], c["likely_logprobs"], c["count"],
    stopped, c["inputs"], keys, values, c["logits"], c["seen"])


def _likeliest(spread):
  """The highest of log probabilities [B, V] and their ids, each [B, 20]."""
  values, ids = jax.lax.top_k(spread, min(LIKELY, spread.shape[-1]))
  spare = ((0, 0), (0, LIKELY - ids.shape[-1]))
  return (jnp.pad(values, spare, constant_values=-jnp.inf),
          jnp.pad(ids.astype(jnp.int32), spare))


def _unlisted(spread):
  shape = spread.shape[0], LIKELY
  return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)


def _behind(old, new, used, axis):
  """Each row's old entries with the new ones behind those that it uses."""
  def row(old, new, used):
    return jax.lax.dynamic_update_slice_in_dim(old, new, used, axis)

  return jax.vmap(row)(old, new, used)
