"""The device loop that decodes a block of up to 32 tokens in many rows.

Every row attends to what its slots hold, as far as it is visible. All sizes
are fixed; lengths, places and settings travel as arrays.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.base import decoder_layer, model, rotation
from mcjax.types import BRANCHING, Array
from mcjax.window import sampling
from mcjax.window.pools import POOL, Pool, stored
from mcjax.window.spread import ALONE, ROWS, Spread

LIKELY = 20  # tokens listed beside the one drawn, at most
NOTHING, LOGPROBS, LIKELIEST = range(3)  # of the chances that are told
_PARTS = 64  # of the vocabulary, at most
_PLAUSIBLE = 0.1  # of the likeliest token's probability, to be picked at all


class Sight(NamedTuple):
  """What rows see of their slots.

  Attributes:
    positions: [B, S] int32.
    visible: [B, S] bool.
    first: [B] int32 position of the first new token.
    logits: [B, V] float32 for it.
    slots: [B, 32] int32 that new tokens go to; beyond the last is nowhere.
  """

  positions: Array
  visible: Array
  first: Array
  logits: Array
  slots: Array


class Block(NamedTuple):
  """What a device loop has made; [B] rows, 32 columns valid up to `count`.

  Attributes:
    tokens: [B, 32] int32.
    logprobs: [B, 32] float32, of each token before temperature and cuts, where
      asked for.
    likely: [B, 32, 20] int32, the likeliest tokens instead, where asked for.
    likely_logprobs: [B, 32, 20] float32.
    count: [B] int32.
    stopped: [B] bool, the last token is a stop token.
    logits: for each stream [B, V] for the token after the last one.
    seen: [B, V] bool.
  """

  tokens: jax.Array
  logprobs: jax.Array
  likely: jax.Array
  likely_logprobs: jax.Array
  count: jax.Array
  stopped: jax.Array
  logits: tuple[jax.Array, ...]
  seen: jax.Array


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
    streams: (pools, sight) of each of M streams.
    own: for each stream and layer the block's turned keys [B, K, H, 32] and
      values [B, K, 32, H] so far.
    i: the token's number in the block.

  Returns:
    hidden [M * B, D], and `own` with the token in it.
  """
  rows = streams[0][1].first.shape[0]
  at = jnp.concatenate([sight.first for _, sight in streams]) + i
  table = rotation.rope_tables(config, at)
  kinds, sees = rotation.layer_kinds(config), [
    _allowed(config, pools, sight, i) for pools, sight in streams]
  out = [[] for _ in streams]
  for n, layer in enumerate(_layers(params, config)):
    q, k, v = decoder_layer.project(config, layer, x)
    kind = kinds.at(n)._replace(rope=None)
    if n not in config.nope_layers:
      q = decoder_layer.turn_queries(q, table, kind)
      k = rotation.turn(k, table, kind)
    parts = []
    for m, (pools, _) in enumerate(streams):
      mine = slice(m * rows, (m + 1) * rows)
      held = _put(own[m][n], k[:, mine], v[:, mine], i)
      out[m].append(held)
      segments = [(p.keys[n], p.values[n]) for p in pools]
      parts.append(_mix(config, kind, q[mine], [*segments, held], sees[m]))
    x = decoder_layer.finish(config, layer, x, jnp.concatenate(parts))
  hidden = decoder_layer.rms_norm(x, params["final_norm"], config.rms_norm_eps)
  return hidden, tuple(tuple(layers) for layers in out)


def _put(held, k, v, i):
  """Turned keys and values of a block with those [K, B, H] of token i."""
  keys, values = held
  k, v = (a.transpose(1, 0, 2) for a in (k, v))
  put = jax.lax.dynamic_update_slice
  return (put(keys, k[..., None], (0, 0, 0, i)),
          put(values, v[:, :, None], (0, 0, i, 0)))


def _allowed(config, pools, sight, i):
  """What token i of a block may read of each pool and of its block.

  Returns:
    masks [B, S] bool, the block's last; and those of layers that read the
    newest positions only, or None.
  """
  place = (sight.first + i)[:, None]
  offsets = jnp.arange(BRANCHING, dtype=jnp.int32)[None]
  behind, start = [], 0
  for pool in pools:
    part = slice(start, start := start + pool.keys[0].shape[-1])
    behind.append(jnp.where(
      sight.visible[:, part], place - sight.positions[:, part], -1))
  behind.append(jnp.broadcast_to(i - offsets, (place.shape[0], BRANCHING)))
  far = [b >= 0 for b in behind]
  if not config.local_layers:
    return far, None
  return far, [(b >= 0) & (b < config.local_window) for b in behind]


def _mix(config, kind, q, segments, sees):
  """Attention [B, N, H] of each row's query to its pools and its block."""
  rows, heads, size = q.shape
  q = q.reshape(rows, config.n_kv_heads, -1, size)
  scores = []
  for part, (k, _) in enumerate(segments):
    allowed = sees[0][part]
    if sees[1] is not None:
      allowed = jnp.where(kind.local, sees[1][part], allowed)
    s = jnp.einsum("bkmh,bkhs->bkms", q, k, preferred_element_type=jnp.float32)
    scores.append(jnp.where(
      allowed[:, None, None], s / math.sqrt(size), decoder_layer.NEGATIVE))
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  out, start = [], 0
  for _, v in segments:
    part = slice(start, start := start + v.shape[-2])
    out.append(jnp.einsum("bkms,bksh->bkmh", weights[..., part].astype(v.dtype),
                          v))
  return functools.reduce(operator.add, out).reshape(rows, heads, size)


def _unembed(params, hidden):
  """Logits [B, V] float32 of hidden [B, D]; see `model.unembed`.

  By parts of the vocabulary: XLA's CPU backend takes up to half as long again
  for one product of a few rows with so many columns.
  """
  if "unembed" in params:
    return model.unembed(params, hidden)
  table = params["embed"]
  parts = table.reshape(math.gcd(len(table), _PARTS), -1, table.shape[1])
  logits = jnp.einsum("bd,pvd->pbv", hidden.astype(table.dtype), parts,
                      preferred_element_type=jnp.float32)
  return logits.transpose(1, 0, 2).reshape(len(hidden), -1)


def _against(logits, prior, weight, on):
  """Logits [B, V] by context-aware decoding, in rows that are `on`: those of
  plausible tokens, and the more the likelier the text makes them."""
  beside, without = jax.nn.log_softmax(logits), jax.nn.log_softmax(prior)
  top = jnp.max(beside, axis=-1, keepdims=True)
  held = jnp.where(beside >= top + math.log(_PLAUSIBLE),
                   beside + weight[:, None] * (beside - without), -jnp.inf)
  return jnp.where(on[:, None], held, logits)


@functools.partial(
  jax.jit, static_argnames=("config", "spread"),
  donate_argnames=("streams", "seen"))
def decode_rows(params, config: model.DecoderConfig,
                streams: tuple[tuple[Pool, ...], ...],
                sights: tuple[Sight, ...],
                limit: jax.Array, stop_ids: jax.Array, rows: sampling.Rows,
                seen: jax.Array, weight: jax.Array, on: jax.Array,
                told: jax.Array, spread: Spread = ALONE
                ) -> tuple[tuple[tuple[Pool, ...], ...], Block]:
  """Decodes up to `limit` [B] <= 32 tokens a row, without a host sync.

  Args:
    params: the frozen base's parameters.
    config: static.
    streams: donated; the pools of the windows and, where any row is held
      against what the LM says without the text it reads, of the same without.
    sights: of the streams.
    limit: [B] int32 tokens wanted; 0 leaves a row alone.
    stop_ids: [8] int32, -1 pads; a row ends after one of them.
    rows: how each row samples; its `seen` is not read.
    seen: donated, see `sampling.Rows`.
    weight: [B] float32, how much what the text adds counts beyond itself.
    on: [B] bool, rows that are held against anything.
    told: [] int32, what of the chances is told: NOTHING (all are 0),
      LOGPROBS of the tokens drawn, or the LIKELIEST tokens too.
    spread: of the rows.

  Returns:
    The pools with the new tokens in them, and a `Block`, every device's.
  """
  count = limit.shape[0]
  size = BRANCHING
  heads, dtype = (count, config.n_kv_heads), streams[0][0].keys[0].dtype
  tall = jnp.zeros((*heads, size, config.head_dim), dtype)
  wide = jnp.zeros((*heads, config.head_dim, size), dtype)
  first = {
    "i": jnp.int32(0), "stopped": limit <= 0,
    "count": jnp.zeros(count, jnp.int32),
    "tokens": jnp.zeros((count, size), jnp.int32),
    "logprobs": jnp.zeros((count, size), jnp.float32),
    "likely": jnp.zeros((count, size, LIKELY), jnp.int32),
    "likely_logprobs": jnp.zeros((count, size, LIKELY), jnp.float32),
    "logits": spread.laid(tuple(s.logits for s in sights), (ROWS,)),
    "seen": seen,
    "own": spread.laid(
      (((wide, tall),) * config.n_layers,) * len(streams), POOL),
  }

  def step(c):
    i, going = c["i"], ~c["stopped"] & (c["i"] < limit)
    found = c["logits"][0]
    if len(streams) > 1:
      found = _against(found, c["logits"][1], weight, on)
    token = sampling.draw(rows._replace(seen=c["seen"]), found, i)
    logprob, best, others = jax.lax.switch(
      told, (_silent, _logprobs, _likeliest), found, token)
    x = model.embed(params, token)
    hidden, own = _forward(
      params, config, jnp.concatenate([x] * len(streams)),
      list(zip(streams, sights)), c["own"], i)
    logits = _unembed(params, hidden).reshape(len(streams), count, -1)
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
      "likely": c["likely"].at[:, i].set(others),
      "likely_logprobs": c["likely_logprobs"].at[:, i].set(best),
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

  streams = tuple(
    stored(pools, sight.slots, *zip(*own))
    for pools, sight, own in zip(streams, sights, c["own"]))
  block = Block(
    c["tokens"], c["logprobs"], c["likely"], c["likely_logprobs"], c["count"],
    stopped, c["logits"], c["seen"])
  return spread.laid(streams, POOL), spread.laid(block, ())


def _silent(logits, token):
  shape = logits.shape[0], LIKELY
  return (jnp.zeros(token.shape, jnp.float32), jnp.zeros(shape, jnp.float32),
          jnp.zeros(shape, jnp.int32))


def _logprobs(logits, token):
  """Log probability [B] of tokens [B] by logits [B, V]."""
  _, *nothing = _silent(logits, token)
  spread = jax.nn.log_softmax(logits)
  drawn = jnp.take_along_axis(spread, token[:, None], axis=-1)[:, 0]
  return drawn, *nothing


def _likeliest(logits, token):
  """The same, and the highest ones with their ids, each [B, 20]."""
  spread = jax.nn.log_softmax(logits)
  drawn = jnp.take_along_axis(spread, token[:, None], axis=-1)[:, 0]
  values, ids = jax.lax.top_k(spread, min(LIKELY, spread.shape[-1]))
  spare = ((0, 0), (0, LIKELY - ids.shape[-1]))
  return (drawn, jnp.pad(values, spare, constant_values=-jnp.inf),
          jnp.pad(ids.astype(jnp.int32), spare))
