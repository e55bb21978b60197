"""The device loop that decodes a block of up to 32 tokens in many rows.

Every row has a view of its window: the keys that the LM attends to, rotated,
and their values, side by side in a fixed capacity. All sizes are fixed;
lengths, places and settings travel as arrays.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mcjax.base import decoder_layer, model, rotation
from mcjax.types import BRANCHING, Array
from mcjax.window import sampling
from mcjax.window.kv_slots import KVSlots

_PLAUSIBLE = 0.1  # of the likeliest token's probability, to be picked at all


class View(NamedTuple):
  """What rows attend to: a tuple over layers of [B, K, C, H].

  Attributes:
    keys: rotated to their positions.
    values: as in the state.
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
  shape = (rows, config.n_kv_heads, capacity, config.head_dim)
  layers = range(config.n_layers)
  return View(tuple(jnp.zeros(shape, dtype) for _ in layers),
              tuple(jnp.zeros(shape, dtype) for _ in layers))


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

  return View(put(view.keys, keys), put(view.values, values))


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
    own: for each stream the block's turned keys and values so far.
    i: the token's number in the block.

  Returns:
    hidden [M * B, D], and for each layer new keys, turned keys and values, each
    [K, M * B, H].
  """
  rows = streams[0][1].first.shape[0]
  at = jnp.concatenate([sight.first for _, sight in streams]) + i
  table = rotation.rope_tables(config, at)
  made, kinds = [], rotation.layer_kinds(config)
  for n, layer in enumerate(_layers(params, config)):
    q, k, v = decoder_layer.project(config, layer, x)
    turned, kind = k, kinds.at(n)._replace(rope=None)
    if n not in config.nope_layers:
      q = decoder_layer.turn_queries(q, table, kind)
      turned = rotation.turn(k, table, kind)
    parts = []
    for m, ((view, sight), (keys, values)) in enumerate(zip(streams, own)):
      mine = slice(m * rows, (m + 1) * rows)
      parts.append(_mix(
        config, kind, q[mine], turned[:, mine], v[:, mine], view.keys[n],
        view.values[n], sight, keys[n], values[n], i))
    x = decoder_layer.finish(config, layer, x, jnp.concatenate(parts))
    made.append((k, turned, v))
  hidden = decoder_layer.rms_norm(x, params["final_norm"], config.rms_norm_eps)
  return hidden, made


def _mix(config, kind, q, k, v, keys, values, sight, new_keys, new_values, i):
  """Attention [B, N, H] of each row to its view, its block and itself."""
  size, capacity = new_keys.shape[2], keys.shape[2]
  offsets = jnp.arange(size, dtype=jnp.int32)

  def row(q, k, v, keys, values, positions, used, first, new_keys, new_values):
    seen = jnp.arange(capacity, dtype=jnp.int32) < used
    place = (first + i)[None]
    segments = [
      (keys, values, positions, seen, True),
      (new_keys, new_values, first + offsets, offsets < i, True),
      (k[:, None], v[:, None], place, jnp.ones(1, bool), True)]
    return decoder_layer.attend(
      config, q[None], segments, [None] * 3, place, kind)[0]

  return jax.vmap(row, in_axes=(0, 1, 1) + (0,) * 7)(
    q, k, v, keys, values, sight.positions, sight.used, sight.first, new_keys,
    new_values)


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
                weight: jax.Array, on: jax.Array
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

  Returns:
    The views with the new tokens in them, and a `Block`.
  """
  count = limit.shape[0]
  size = BRANCHING
  view = views[0]
  shape = (count, config.n_kv_heads, size, config.head_dim)

  def buffers():
    return tuple(jnp.zeros(shape, view.keys[0].dtype)
                 for _ in range(config.n_layers))

  first = {
    "i": jnp.int32(0), "stopped": limit <= 0,
    "count": jnp.zeros(count, jnp.int32),
    "tokens": jnp.zeros((count, size), jnp.int32),
    "logprobs": jnp.zeros((count, size), jnp.float32),
    "inputs": jnp.zeros((count, size, config.d_model), view.keys[0].dtype),
    "logits": tuple(s.logits for s in sights), "seen": seen,
    "keys": tuple(buffers() for _ in views),
    "turned": tuple(buffers() for _ in views),
    "values": tuple(buffers() for _ in views),
  }

  def step(c):
    i, going = c["i"], ~c["stopped"] & (c["i"] < limit)
    found = c["logits"][0]
    if len(views) > 1:
      found = _against(found, c["logits"][1], weight, on)
    token = sampling.draw(rows._replace(seen=c["seen"]), found, i)
    spread = jax.nn.log_softmax(found)
    logprob = jnp.take_along_axis(spread, token[:, None], axis=-1)[:, 0]
    x = model.embed(params, token)
    hidden, made = _forward(
      params, config, jnp.concatenate([x] * len(views)),
      list(zip(views, sights)), list(zip(c["turned"], c["values"])), i)
    logits = model.unembed(params, hidden)
    keys, turned, values, fresh = [], [], [], []
    for m, old in enumerate(c["logits"]):
      mine = slice(m * count, (m + 1) * count)

      def put(name, part, m=m, mine=mine):
        return tuple(
          jax.lax.dynamic_update_slice(
            buffer, layer[part][:, mine].transpose(1, 0, 2)[:, :, None],
            (0, 0, i, 0))
          for buffer, layer in zip(c[name][m], made))

      keys.append(put("keys", 0))
      turned.append(put("turned", 1))
      values.append(put("values", 2))
      fresh.append(jnp.where(going[:, None], logits[mine], old))
    at = jnp.arange(count)
    return {
      "i": i + 1,
      "stopped": c["stopped"] | jnp.any(
        token[:, None] == stop_ids[None], axis=-1),
      "count": c["count"] + going.astype(jnp.int32),
      "tokens": c["tokens"].at[:, i].set(token),
      "logprobs": c["logprobs"].at[:, i].set(logprob),
      "inputs": jax.lax.dynamic_update_slice(
        c["inputs"], x[:, None], (0, i, 0)),
      "logits": tuple(fresh),
      "seen": c["seen"].at[at, token].max(going),
      "keys": tuple(keys), "turned": tuple(turned), "values": tuple(values),
    }

  def unfinished(c):
    return jnp.any(~c["stopped"] & (c["i"] < limit))

  # A row that has ended idles: what it makes then is beyond its count.
  c = jax.lax.while_loop(unfinished, step, first)
  stopped = jnp.any(
    (c["tokens"][:, :, None] == stop_ids[None, None])
    & (jnp.arange(size)[None, :] < c["count"][:, None])[:, :, None],
    axis=(1, 2))

  def joined(old, new, used):
    def row(old, new, used):
      return jax.lax.dynamic_update_slice(old, new, (0, used, 0))
    return jax.vmap(row)(old, new, used)

  views = tuple(
    View(tuple(joined(a, b, s.used) for a, b in zip(v.keys, turned)),
         tuple(joined(a, b, s.used) for a, b in zip(v.values, values)))
    for v, s, turned, values in zip(views, sights, c["turned"], c["values"]))
  return views, Block(
    c["tokens"], c["logprobs"], c["count"], stopped, c["inputs"], c["keys"],
    c["values"], c["logits"], c["seen"])
