"""Many windows over one LM: their caches, and the loop that decodes them.

A history is a row. What a row attends to, where it stands, how it samples and
how much it wants travel as arrays, so rows come, go and are refocused without
recompiling. Whoever works on the caches waits for its turn, in the order of
asking: so prompts are spliced between the blocks that are decoded, those that
have waited meanwhile together.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import model
from mcjax.base.decoder_config import DecoderConfig
from mcjax.types import BRANCHING
from mcjax.window import decode_loop, sampling
from mcjax.window.decode_loop import Block, Sight
from mcjax.window.pools import Held
from mcjax.window.row_cache import RowCache, near_slots, prior_slots
from mcjax.window.sampling import Sampling
from mcjax.window.slot_inputs import Inputs
from mcjax.window.splicing import Splicer
from mcjax.window.spread import ALONE, ROWS, Spread
from mcjax.window.turn import Turn


@dataclasses.dataclass
class Draw:
  """How an answer is drawn.

  Attributes:
    sampling: its settings.
    key: PRNG key.
    drawn: tokens drawn so far.
    seen: [V] bool of the prompt, or None where no penalty asks for it.
    logprobs: whether log probabilities of the tokens are wanted.
    likely: how many of the likeliest tokens are listed beside each, <= 20.
  """

  sampling: Sampling
  key: jax.Array
  drawn: int = 0
  seen: np.ndarray | None = None
  logprobs: bool = False
  likely: int = 0

  @property
  def told(self) -> int:
    """What of the chances is wanted, see `decode_rows`."""
    if self.likely:
      return decode_loop.LIKELIEST
    return decode_loop.LOGPROBS if self.logprobs else decode_loop.NOTHING


@dataclasses.dataclass
class Seen:
  """One window as a stream reads it.

  A stream is one reading of the window: as it is, or, where answers are held
  against it, without the text (see `contrast.py`).

  Attributes:
    positions, visible: [S], by slot.
    first: position of the next token.
    logits: [V] for it.
    slots: [limit] int32 that new tokens go to.
  """

  positions: np.ndarray
  visible: np.ndarray
  first: int
  logits: jax.Array
  slots: np.ndarray


@dataclasses.dataclass
class Job:
  """What one row asks for: up to `limit` tokens.

  Attributes:
    row: of the decoder.
    limit: tokens wanted.
    draw: how they are drawn.
    window: what is read.
    prior: the same without the text, if the answer is held against it.
    weight: how much.
  """

  row: int
  limit: int
  draw: Draw
  window: Seen
  prior: Seen | None
  weight: float


class Said(NamedTuple):
  """A row's share of a `Block`, on the host but for logits."""

  tokens: np.ndarray
  logprobs: np.ndarray
  likely: np.ndarray
  likely_logprobs: np.ndarray
  stopped: bool
  logits: tuple[jax.Array, ...]


def _nothing(job: Job) -> Said:
  shape = 0, job.draw.likely
  logits = [seen.logits for seen in (job.window, job.prior) if seen]
  return Said(
    np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(shape, np.int32),
    np.zeros(shape, np.float32), False, tuple(logits))


class Decoder:
  """The caches of B rows, and the loop that decodes them together.

  Attributes:
    rows: B.
    turn: held by whoever works on the caches; `with decoder.turn:`.
    sizes: of splices; each is padded to the next one.
    splicer: runs them, those that wait for the same turn together.
    spread: how rows lie on devices.
  """

  def __init__(self, params, config: DecoderConfig, rows: int, window: int,
               dtype, stop_ids: np.ndarray, sizes: tuple[int, ...],
               splices: int = 1, spread: Spread = ALONE):
    """Args: params: as `model.forward` takes them. window: slots of each
    row's. splices: that run together on a device, at most."""
    self.rows, self.turn, self.sizes = rows, Turn(), sizes
    self.spread = spread
    self.splicer = Splicer(
      params, config, window, sizes, splices, spread, self._cache)
    self._params, self._config, self._dtype = (
      model.unstacked(params), config, dtype)
    self._stop_ids, self._window = stop_ids, window
    self._caches = [self._empty(window, near_slots(window))]
    self._seen = spread.put(jnp.zeros((rows, config.vocab_size), bool), ())
    self._none = spread.at_home(jnp.zeros(config.vocab_size, jnp.float32))
    self._key = jax.random.key(0)
    self._warm: set[bool] = set()

  @property
  def near(self) -> int:
    """Slots from which rows are decoded faster."""
    return self._caches[0].near

  @property
  def lost(self) -> int:
    """How often all rows were lost, in work that was cut off."""
    return sum(cache.lost for cache in self._caches)

  def _cache(self, stream: int) -> RowCache:
    while stream >= len(self._caches):  # of prompts and answers alone
      slots = prior_slots(self._window)
      self._caches.append(self._empty(slots, slots))
    return self._caches[stream]

  def _empty(self, slots: int, near: int) -> RowCache:
    return RowCache(self._config, self.rows, slots, self._dtype, near,
                    self.splicer.width, self.spread)

  # --- splices ------------------------------------------------------------

  def splice(self, stream: int, row: int, slots: np.ndarray, inputs: Inputs,
             seen: tuple[np.ndarray, np.ndarray], store: bool = True
             ) -> jax.Array:
    """Runs the LM over the entries in slots [n]; hidden [T, D], T >= n.

    Together with what other rows want, where they wait for the same turn.

    Args:
      stream: see `Seen`.
      row: of the decoder.
      slots: of the window.
      inputs: of these slots.
      seen: positions and visibility [S] of its slots.
      store: whether their keys and values are kept.
    """
    mine = self.splicer.splice(stream, row, slots, inputs, seen, store)
    with self.splicer.waiting(mine), self.turn:
      self.splicer.run(mine)
    assert mine.hidden is not None
    return mine.hidden

  # --- one row ------------------------------------------------------------

  def permute(self, row: int, order: np.ndarray) -> None:
    """Slot i of a row's window gets what was in slot order[i]."""
    with self.turn:
      self._caches[0].permute(row, order)

  def read(self, row: int) -> tuple[Held, np.ndarray]:
    """What a window's slots hold, and the positions its keys are rotated to."""
    with self.turn:
      return self._caches[0].read(row)

  def replace(self, row: int, held: Held, positions: np.ndarray) -> None:
    """Replaces what a row's slots hold in the first stream."""
    with self.turn:
      self._caches[0].replace(row, held, positions)

  # --- many rows ----------------------------------------------------------

  def run(self, jobs: list[Job]) -> list[Said]:
    """Decodes the jobs together; at most one for each row.

    Nothing is said where another's work was cut off and all rows are lost;
    `lost` tells.
    """
    with self.turn:
      if any([cache.notice() for cache in self._caches]):
        return [_nothing(job) for job in jobs]
      streams = 2 if any(job.prior for job in jobs) else 1
      block = self._decoded(jobs, streams, any(map(self._is_far, jobs)))
      return self._shared_out(jobs, block)

  def _is_far(self, job: Job) -> bool:
    return bool(job.window.visible[self.near :].any()
                or (job.window.slots >= self.near).any())

  def _decoded(self, jobs: list[Job], streams: int, far: bool) -> Block:
    sights = []
    for m in range(streams):
      cache, seen = self._cache(m), {}
      for j in jobs:
        if (window := j.prior if m else j.window) is not None:
          cache.move(j.row, window.positions, window.visible)
          seen[j.row] = window
      sights.append(self._sight(m, seen))
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
    return self._loop(
      sights, far, limit, rows, weight, on,
      np.int32(max(job.draw.told for job in jobs)))

  def _loop(self, sights: list[Sight], far: bool, limit: np.ndarray,
            rows: sampling.Rows, weight: np.ndarray, on: np.ndarray,
            told: np.int32) -> Block:
    caches = self._caches[: len(sights)]
    streams, block = decode_loop.decode_rows(
      self._params, self._config, tuple(c.take(far) for c in caches),
      tuple(sights), limit, self._stop_ids, rows, self._seen, weight,
      on, told, self.spread)
    for cache, pools in zip(caches, streams):
      cache.give(pools)
    self._seen = block.seen
    return block._replace(logits=tuple(map(self.spread.at_home, block.logits)))

  def _sight(self, stream: int, seen: dict[int, Seen]) -> Sight:
    size = self._cache(stream).slots
    positions = np.zeros((self.rows, size), np.int32)
    visible = np.zeros((self.rows, size), bool)
    slots = np.full((self.rows, BRANCHING), size, np.int32)
    first = np.zeros(self.rows, np.int32)
    logits = [self._none] * self.rows
    for row, one in seen.items():
      positions[row], visible[row] = one.positions, one.visible
      slots[row, : len(one.slots)] = one.slots
      first[row], logits[row] = one.first, one.logits
    return Sight(positions, visible, first, self.spread.put(
      decode_loop.stacked(logits), (ROWS,)), slots)

  def _shared_out(self, jobs: list[Job], block: Block) -> list[Said]:
    tokens, logprobs, likely, values, count, stopped = jax.device_get(
      (block.tokens, block.logprobs, block.likely, block.likely_logprobs,
       block.count, block.stopped))
    out = []
    for j in jobs:
      n, logits = int(count[j.row]), []
      for m, seen in enumerate((j.window, j.prior)):
        if seen is not None:
          positions = seen.positions.copy()
          positions[seen.slots] = seen.first + np.arange(len(seen.slots))
          self._caches[m].mark(j.row, seen.slots, positions)
          logits.append(block.logits[m][j.row])
      j.draw.drawn += n
      k = j.draw.likely
      out.append(Said(
        tokens[j.row, :n], logprobs[j.row, :n], likely[j.row, :n, :k],
        values[j.row, :n, :k], bool(stopped[j.row]), tuple(logits)))
    return out

  # --- compiling ----------------------------------------------------------

  def programs(self, contrast: bool, first: int = 1) -> Iterator[None]:
    """Compiles what rows need, one program at a time, once.

    Args:
      contrast: whether with a second stream too.
      first: so many streams are decoded first of all.
    """
    if contrast in self._warm:
      return
    self._warm.add(contrast)
    counts = sorted(range(1, 2 + contrast), key=lambda n: n != first)
    for far in (False, True):
      for streams in counts:
        with self.turn:
          self._compile_loop(streams, far)
        yield
    for size in self.sizes:
      for compiled in (self.splicer.compile_alone,
                       self.splicer.compile_together):
        with self.turn:
          compiled(size, 1 + contrast)
        yield

  def _compile_loop(self, streams: int, far: bool) -> None:
    rows = sampling.Rows(
      np.tile(sampling.numbers_of(Sampling()), (self.rows, 1)),
      decode_loop.stacked([self._key] * self.rows),
      np.zeros(self.rows, np.int32), np.zeros((), bool))
    block = self._loop(
      [self._sight(m, {}) for m in range(streams)], far,
      np.zeros(self.rows, np.int32), rows,
      np.zeros(self.rows, np.float32), np.zeros(self.rows, bool),
      np.int32(decode_loop.NOTHING))
    jax.block_until_ready([logits[0] for logits in block.logits])
    self._seen = decode_loop.with_row(
      self._seen, np.zeros(self._seen.shape[1], bool), np.int32(0))
