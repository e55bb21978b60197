"""Decoding of many windows at once: one device loop, one row a history.

Every row has a view of its window: the keys that the LM attends to, rotated,
and their values, side by side in a fixed capacity. What a row attends to,
where it stands, how it samples and how much it wants travel as arrays, so rows
come, go and are refocused without recompiling. New keys and values are added to
the view; only a row whose window has changed is gathered anew.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base.decoder_config import DecoderConfig
from mcjax.types import BRANCHING
from mcjax.window import decode_loop, kv_slots, sampling
from mcjax.window.decode_loop import Block, Sight, View
from mcjax.window.kv_slots import KVSlots
from mcjax.window.sampling import Sampling

_SMALL = 4  # the smaller capacity is the window divided by this
_LEAST = 256  # and at least so many entries


@dataclasses.dataclass
class Draw:
  """How an answer is drawn.

  Attributes:
    sampling: its settings.
    key: PRNG key.
    drawn: tokens drawn so far.
    seen: [V] bool of the prompt, or None where no penalty asks for it.
    likely: how many of the likeliest tokens are listed beside each, <= 20.
  """

  sampling: Sampling
  key: jax.Array
  drawn: int = 0
  seen: np.ndarray | None = None
  likely: int = 0


@dataclasses.dataclass
class Seen:
  """One window as a stream reads it.

  A stream is one reading of the window: as it is, or, where answers are held
  against it, without the text (see `contrast.py`).

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
  likely: np.ndarray
  likely_logprobs: np.ndarray
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

  def __init__(self, params, config: DecoderConfig, rows: int,
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
        self._seen = decode_loop.with_row(
          self._seen, j.draw.seen, np.int32(j.row))
        j.draw.seen = None
    rows = sampling.Rows(
      numbers, decode_loop.stacked(keys), drawn, np.zeros((), bool))
    views, block = decode_loop.decode_rows(
      self._params, self._config, tuple(views), tuple(sights), limit,
      self._stop_ids, rows, self._seen, weight, on,
      np.array(any(job.draw.likely for job in jobs)))
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
      self._views[key] = decode_loop.empty_view(
        self._config, self.rows, capacity, self._dtype)
    for row, window in seen.items():
      held = self._held.setdefault((stream, capacity, row), _Held())
      if window is None or held.is_still(window):
        continue
      order = np.flatnonzero(window.visible)
      order = order[np.argsort(window.positions[order], kind="stable")]
      held.slots, held.positions = order, window.positions[order]
      spare = (0, capacity - len(order))
      self._views[key] = decode_loop.gather(
        self._config, self._views[key], window.state,
        np.pad(order, spare).astype(np.int32),
        decode_loop.rope_of(self._config, np.pad(held.positions, spare)),
        np.int32(row))
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
    return Sight(positions, used, first, decode_loop.stacked(logits))

  def _shared_out(self, jobs: list[Job], block: Block, capacity: int
                  ) -> list[Said]:
    tokens, logprobs, likely, values, count, stopped = jax.device_get(
      (block.tokens, block.logprobs, block.likely, block.likely_logprobs,
       block.count, block.stopped))
    out = []
    for j in jobs:
      n = int(count[j.row])
      slots = kv_slots.pad(j.slots[:n].astype(np.int32), BRANCHING,
                           self._window)
      states, logits = [], []
      for m, seen in enumerate((j.window, j.prior)):
        if seen is None:
          continue
        states.append(decode_loop.store(
          seen.state, block, np.int32(j.row), slots, m))
        logits.append(block.logits[m][j.row])
        held = self._held[m, capacity, j.row]
        places = seen.first + np.arange(n, dtype=np.int32)
        held.slots = np.concatenate([held.slots, j.slots[:n]])
        held.positions = np.concatenate([held.positions, places])
        for other in self.capacities:  # the other one is out of date
          if other != capacity:
            self._held.pop((m, other, j.row), None)
      j.draw.drawn += n
      k = j.draw.likely
      out.append(Said(
        tokens[j.row, :n], logprobs[j.row, :n], likely[j.row, :n, :k],
        values[j.row, :n, :k], bool(stopped[j.row]), tuple(states),
        tuple(logits)))
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
          decode_loop.stacked([self._key] * self.rows),
          np.zeros(self.rows, np.int32), np.zeros((), bool))
        for m in range(streams):
          self._views.pop((m, capacity))
        _, block = decode_loop.decode_rows(
          self._params, self._config, views, sights,
          np.zeros(self.rows, np.int32), self._stop_ids, rows, self._seen,
          np.zeros(self.rows, np.float32), np.zeros(self.rows, bool),
          np.array(False))
        self._seen = block.seen
        for m in range(streams):
          copy = jax.tree.map(jnp.copy, state)
          decode_loop.store(copy, block, np.int32(0), slots, m)
          jax.block_until_ready(block.logits[m][0])
    self._seen = decode_loop.with_row(
      self._seen, np.zeros(self._seen.shape[1], bool), np.int32(0))
    self._held.clear()
