"""Decoding of many windows at once: one device loop, one row a history.

Every row has a view of its window: the keys that the LM attends to, rotated,
and their values, side by side in a fixed capacity. What a row attends to,
where it stands, how it samples and how much it wants travel as arrays, so rows
come, go and are refocused without recompiling. New keys and values are added to
the view; only a row whose window has changed is gathered anew.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import decoder_layer, model, rotation
from mcjax.types import BRANCHING, Array
from mcjax.window import kv_slots, sampling
from mcjax.window.kv_slots import KVSlots
from mcjax.window.sampling import Sampling

_SMALL = 4  # the smaller capacity is the window divided by this
_LEAST = 256  # and at least so many entries
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
def _empty(config, rows, capacity, dtype):
  shape = (rows, config.n_kv_heads, capacity, config.head_dim)
  layers = range(config.n_layers)
  return View(tuple(jnp.zeros(shape, dtype) for _ in layers),
              tuple(jnp.zeros(shape, dtype) for _ in layers))


@functools.partial(jax.jit, static_argnames="config")
def _rope(config, positions):
  # A program of its own: else the cosines are fused into every rotation.
  return rotation.rope_tables(config, positions)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def _gather(config, view, state, slots, tables, row):
  """The view with slots [C] of a window's state in one row."""
  keys, values, kinds = [], [], rotation.layer_kinds(config)
  for i in range(config.n_layers):
    k = jnp.take(state.keys[i], slots, axis=1, mode="clip")
    v = jnp.take(state.values[i], slots, axis=1, mode="clip")
    if i not in config.nope_layers:
      k = rotation.turn(k, tables, kinds.at(i)._replace(rope=None))
    at = (row, 0, 0, 0)
    keys.append(jax.lax.dynamic_update_slice(view.keys[i], k[None], at))
    values.append(jax.lax.dynamic_update_slice(view.values[i], v[None], at))
  return View(tuple(keys), tuple(values))


@functools.partial(jax.jit, static_argnames="stream", donate_argnums=0)
def _store(state, block, row, slots, stream):
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
def _stacked(rows):
  return jnp.stack(rows)


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


@dataclasses.dataclass
class Draw:
  """How an answer is drawn.

  Attributes:
    sampling: its settings.
    key: PRNG key.
    drawn: tokens drawn so far.
    seen: [V] bool of the prompt, or None where no penalty asks for it.
  """

  sampling: Sampling
  key: jax.Array
  drawn: int = 0
  seen: np.ndarray | None = None


@dataclasses.dataclass
class Seen:
  """One window as a stream reads it.

  Attributes:
    state: its cache.
    positions, visible: [S], by slot.
    first: position of the next token.
    logits: [V] for it.
    fresh: keys and values have been computed since the last block.
  """

  state: KVSlots
  positions: np.ndarray
  visible: np.ndarray
  first: int
  logits: jax.Array
  fresh: bool


@dataclasses.dataclass
class Job:
  """What one row asks for: up to `limit` tokens into `slots`.

  Attributes:
    row: of the decoder.
    limit: tokens wanted.
    slots: [limit] int32 that they go to.
    draw: how they are drawn.
    window: what is read.
    prior: the same without the text, if the answer is held against it.
    weight: how much.
  """

  row: int
  limit: int
  slots: np.ndarray
  draw: Draw
  window: Seen
  prior: Seen | None
  weight: float


class Said(NamedTuple):
  """A row's share of a `Block`, on the host but for logits and states."""

  tokens: np.ndarray
  logprobs: np.ndarray
  stopped: bool
  states: tuple[KVSlots, ...]
  logits: tuple[jax.Array, ...]


class _Held:
  """The host's record of what a row of a view holds."""

  def __init__(self):
    self.slots = np.zeros(0, np.int64)
    self.positions = np.zeros(0, np.int32)

  def is_still(self, seen: Seen) -> bool:
    slots = np.flatnonzero(seen.visible)
    order = np.argsort(self.slots, kind="stable")
    return (not seen.fresh and np.array_equal(self.slots[order], slots)
            and np.array_equal(self.positions[order], seen.positions[slots]))


class Decoder:
  """The views of B rows, and the loop that decodes them together."""

  def __init__(self, params, config: model.DecoderConfig, rows: int,
               window: int, dtype, stop_ids: np.ndarray):
    """Args: params: see `model.unstacked`. window: slots of each row's."""
    self.rows = rows
    self._params, self._config, self._dtype = params, config, dtype
    self._stop_ids, self._window = stop_ids, window
    small = max(_LEAST, window // _SMALL)
    self.capacities = tuple(sorted({min(small, window + BRANCHING),
                                    window + BRANCHING}))
    self._views: dict[tuple[int, int], View] = {}  # by stream and capacity
    self._held: dict[tuple[int, int, int], _Held] = {}
    self._seen = jnp.zeros((rows, config.vocab_size), bool)
    self._none = jnp.zeros(config.vocab_size, jnp.float32)
    self._key = jax.random.key(0)
    self._lock = threading.Lock()
    self._warm = False

  def release(self, row: int) -> None:
    """Forgets what a row holds."""
    with self._lock:
      for key in [k for k in self._held if k[2] == row]:
        del self._held[key]

  def run(self, jobs: list[Job]) -> list[Said]:
    """Decodes the jobs together; at most one for each row."""
    with self._lock:
      return self._decode(jobs)

  def _decode(self, jobs: list[Job]) -> list[Said]:
    streams = 2 if any(job.prior for job in jobs) else 1
    most = max(int(np.count_nonzero(job.window.visible)) for job in jobs)
    capacity = next(c for c in self.capacities if c >= most + BRANCHING)
    views, sights = [], []
    for m in range(streams):
      seen = {j.row: j.prior if m else j.window for j in jobs}
      views.append(self._view(m, capacity, seen))
      sights.append(self._sight(m, capacity, seen))
      self._views.pop((m, capacity))  # donated
    limit = np.zeros(self.rows, np.int32)
    numbers = np.tile(sampling.numbers_of(Sampling()), (self.rows, 1))
    drawn = np.zeros(self.rows, np.int32)
    weight, on = np.zeros(self.rows, np.float32), np.zeros(self.rows, bool)
    keys = [self._key] * self.rows
    for j in jobs:
      limit[j.row], drawn[j.row] = j.limit, j.draw.drawn
      numbers[j.row] = sampling.numbers_of(j.draw.sampling)
      keys[j.row], weight[j.row] = j.draw.key, j.weight
      on[j.row] = j.prior is not None
      if j.draw.seen is not None:
        self._seen = self._seen.at[j.row].set(j.draw.seen)
        j.draw.seen = None
    rows = sampling.Rows(numbers, _stacked(keys), drawn, np.zeros((), bool))
    views, block = decode_rows(
      self._params, self._config, tuple(views), tuple(sights), limit,
      self._stop_ids, rows, self._seen, weight, on)
    self._seen = block.seen
    for m, view in enumerate(views):
      self._views[m, capacity] = view
    return self._shared_out(jobs, block, capacity)

  def _view(self, stream: int, capacity: int, seen: dict[int, Seen | None]
            ) -> View:
    """The view of a stream, with every row as its window is now."""
    key = stream, capacity
    if key not in self._views:  # none yet, or lost in work that was cut off
      for held in [h for h in self._held if h[:2] == key]:
        del self._held[held]
      self._views[key] = _empty(
        self._config, self.rows, capacity, self._dtype)
    for row, window in seen.items():
      held = self._held.setdefault((stream, capacity, row), _Held())
      if window is None or held.is_still(window):
        continue
      order = np.flatnonzero(window.visible)
      order = order[np.argsort(window.positions[order], kind="stable")]
      held.slots, held.positions = order, window.positions[order]
      spare = (0, capacity - len(order))
      self._views[key] = _gather(
        self._config, self._views[key], window.state,
        np.pad(order, spare).astype(np.int32),
        _rope(self._config, np.pad(held.positions, spare)), np.int32(row))
    return self._views[key]

  def _sight(self, stream: int, capacity: int, seen: dict[int, Seen | None]
             ) -> Sight:
    positions = np.zeros((self.rows, capacity), np.int32)
    used, first = np.zeros((2, self.rows), np.int32)
    logits = [self._none] * self.rows
    for (m, c, row), held in list(self._held.items()):
      if (m, c) == (stream, capacity) and row not in seen:
        used[row] = len(held.slots)  # what idles is left as it is
        if used[row] > capacity - BRANCHING:  # no room to leave it alone
          self._held.pop((m, c, row))
          used[row] = 0
    for row, window in seen.items():
      if window is not None:
        held = self._held[stream, capacity, row]
        used[row] = len(held.slots)
        positions[row, : used[row]] = held.positions
        first[row], logits[row] = window.first, window.logits
    return Sight(positions, used, first, _stacked(logits))

  def _shared_out(self, jobs: list[Job], block: Block, capacity: int
                  ) -> list[Said]:
    tokens, logprobs, count, stopped = jax.device_get(
      (block.tokens, block.logprobs, block.count, block.stopped))
    out = []
    for j in jobs:
      n = int(count[j.row])
      slots = kv_slots.pad(j.slots[:n].astype(np.int32), BRANCHING,
                           self._window)
      states, logits = [], []
      for m, seen in enumerate((j.window, j.prior)):
        if seen is None:
          continue
        states.append(_store(seen.state, block, np.int32(j.row), slots, m))
        logits.append(block.logits[m][j.row])
        held = self._held[m, capacity, j.row]
        places = seen.first + np.arange(n, dtype=np.int32)
        held.slots = np.concatenate([held.slots, j.slots[:n]])
        held.positions = np.concatenate([held.positions, places])
        for other in self.capacities:  # the other one is out of date
          if other != capacity:
            self._held.pop((m, other, j.row), None)
      j.draw.drawn += n
      out.append(Said(tokens[j.row, :n], logprobs[j.row, :n],
                      bool(stopped[j.row]), tuple(states), tuple(logits)))
    return out

  def warm_up(self, state: KVSlots, contrast: bool) -> None:
    """Compiles both capacities, with and without a second stream, once."""
    with self._lock:
      if not self._warm:
        self._compile(state, contrast)
        self._warm = True

  def _compile(self, state: KVSlots, contrast: bool) -> None:
    window = Seen(state, np.zeros(self._window, np.int32),
                  np.zeros(self._window, bool), 0, self._none, True)
    slots = np.full(BRANCHING, self._window, np.int32)
    for streams in (1, 2) if contrast else (1,):
      for capacity in self.capacities:
        seen: dict[int, Seen | None] = {0: window}
        views = tuple(
          self._view(m, capacity, seen) for m in range(streams))
        sights = tuple(
          self._sight(m, capacity, seen) for m in range(streams))
        rows = sampling.Rows(
          np.tile(sampling.numbers_of(Sampling()), (self.rows, 1)),
          _stacked([self._key] * self.rows), np.zeros(self.rows, np.int32),
          np.zeros((), bool))
        for m in range(streams):
          self._views.pop((m, capacity))
        _, block = decode_rows(
          self._params, self._config, views, sights,
          np.zeros(self.rows, np.int32), self._stop_ids, rows, self._seen,
          np.zeros(self.rows, np.float32), np.zeros(self.rows, bool))
        self._seen = block.seen
        for m in range(streams):
          copy = jax.tree.map(jnp.copy, state)
          _store(copy, block, np.int32(0), slots, m)
          jax.block_until_ready(block.logits[m][0])
    self._held.clear()
