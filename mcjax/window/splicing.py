"""Splices of many rows, those that wait for the same turn run together.

Flat combining (Hendler et al. 2010, doi:10.1145/1810479.1810540): whoever has
the turn runs the work of others who wait beside its own. Every one of them
still gets its turn; what has been done meanwhile is not done again, and what
has not, since another failed or was interrupted, is done then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import logging
import threading

import jax
import numpy as np

from mcjax.base.decoder_config import DecoderConfig
from mcjax.window import kv_slots
from mcjax.window.kv_slots import Spliced
from mcjax.window.row_cache import RowCache
from mcjax.window.slot_inputs import Inputs
from mcjax.window.spread import ROWS, Spread


@dataclasses.dataclass(eq=False)
class Splice:
  """What one row wants to be run.

  Attributes:
    stream: see `decoding.Seen`.
    row: of the decoder.
    slots: [T] int32, padded with the window's number of slots.
    inputs: of these slots, padded.
    positions, visible: [S], by slot.
    store: whether keys and values are kept.
    alone: not together with others, since that has failed.
    hidden: [T, D] once it is done.
  """

  stream: int
  row: int
  slots: np.ndarray
  inputs: Inputs
  positions: np.ndarray
  visible: np.ndarray
  store: bool
  alone: bool = False
  hidden: jax.Array | None = None

  def joins(self, other: Splice) -> bool:
    """Whether it still is to be run, and one program may run both."""
    return (self.hidden is None and not (self.alone or other.alone)
            and self.stream == other.stream and self.row != other.row
            and len(self.slots) == len(other.slots))


class Splicer:
  """Runs splices; whoever lets it must hold the decoder's turn.

  Attributes:
    width: splices that run together, at most; on a mesh of all devices.
    done: splices so far.
    runs: programs that ran them; fewer where some ran together.
  """

  def __init__(self, params, config: DecoderConfig, window: int,
               sizes: tuple[int, ...], width: int, spread: Spread,
               cache_of: Callable[[int], RowCache]):
    """Args: params: as `model.forward` takes them. window: slots of a row.
    sizes: of splices, see `Decoder`. width: splices of one device. spread: of
    the rows. cache_of: the cache of a stream."""
    self.width, self.done, self.runs = width * spread.parts, 0, 0
    self._spread = spread
    self._params, self._config = params, config
    self._window, self._sizes, self._cache = window, sizes, cache_of
    self._lock = threading.Lock()
    self._waiting: list[Splice] = []

  def splice(self, stream: int, row: int, slots: np.ndarray, inputs: Inputs,
             seen: tuple[np.ndarray, np.ndarray], store: bool) -> Splice:
    """What `Decoder.splice` is asked for, padded."""
    size = next(s for s in self._sizes if s >= len(slots))
    spare = (0, size - len(slots))
    padded = Inputs(np.pad(inputs.ids, spare),
                    np.pad(inputs.gists, (spare, (0, 0))),
                    np.pad(inputs.is_gist, spare))
    return Splice(stream, row, self._padded(slots, size), padded, *seen, store)

  @contextlib.contextmanager
  def waiting(self, splice: Splice) -> Iterator[None]:
    """Lets whoever has the turn meanwhile run it too; needs no turn."""
    with self._lock:
      self._waiting.append(splice)
    try:
      yield
    finally:
      with self._lock:
        self._waiting.remove(splice)

  def run(self, mine: Splice) -> None:
    """Runs it, and others that wait, where they are enough to be worth it."""
    if mine.hidden is not None:
      return
    group = self._group(mine)
    if len(group) > 1 and self._is_worth_it(group):
      try:
        return self._together(group)
      except Exception:  # whose it is shows when each runs by itself
        logging.getLogger(__name__).warning(
          "%d splices failed together; each runs by itself", len(group),
          exc_info=True)
        for one in group:
          one.alone = True
    if self._spread.mesh is None:
      self._alone(mine)
    else:
      self._together([mine])

  def _group(self, mine: Splice) -> list[Splice]:
    """It, and of those that wait as many as fit."""
    with self._lock:
      others = [other for other in self._waiting if other.joins(mine)]
    cache, group = self._cache(mine.stream), [mine]
    for other in others:
      if cache.fits([one.row for one in (*group, other)]):
        group.append(other)
    return group

  def _is_worth_it(self, group: list[Splice]) -> bool:
    """A mesh has one program for any number; elsewhere the rest is padding."""
    return self._spread.mesh is not None or 2 * len(group) >= self.width

  def _alone(self, one: Splice) -> None:
    cache = self._cache(one.stream)
    cache.move(one.row, one.positions, one.visible)
    held, _ = cache.read(one.row, self._window)
    spare = 0, self._window - cache.slots
    out = kv_slots.splice(
      self._params, self._config, held, one.slots, *one.inputs,
      np.pad(one.positions, spare), np.pad(one.visible, spare),
      self._sizes[-1])
    if one.store:
      cache.write(one.row, self._padded(one.slots), out.keys, out.values,
                  one.positions)
    self._count(1)
    one.hidden = out.hidden

  def _together(self, group: list[Splice]) -> None:
    cache, rows = self._cache(group[0].stream), [one.row for one in group]
    places = [one.positions for one in group]
    cache.move_rows(rows, places, [one.visible for one in group])
    out = self._run_rows(cache, group)
    cache.write_rows(
      rows, [self._padded(one.slots if one.store else one.slots[:0])
             for one in group], out.keys, out.values, places)
    self._count(len(group))
    hidden = self._spread.at_home(out.hidden)
    for lane, one in zip(cache.lanes(rows), group):
      one.hidden = kv_slots.hidden_of(hidden, np.int32(lane))

  def _run_rows(self, cache: RowCache, group: list[Splice]) -> Spliced:
    spare, rows = (0, self._window - cache.slots), [one.row for one in group]

    def padded(parts, fill: int = 0) -> jax.Array | np.ndarray:
      return self._spread.put(cache.padded(rows, parts, fill), (ROWS,))

    return kv_slots.splice_rows(
      self._params, self._config, cache.read_rows(rows, self._window),
      padded([one.slots for one in group], self._window),
      *map(padded, zip(*(one.inputs for one in group))),
      padded([np.pad(one.positions, spare) for one in group]),
      padded([np.pad(one.visible, spare) for one in group]),
      self._sizes[-1], self._spread)

  def _padded(self, slots: np.ndarray, size: int = 0) -> np.ndarray:
    """Slots as [size] int32, by default as many as the largest splice has."""
    return kv_slots.pad(
      slots.astype(np.int32), size or self._sizes[-1], self._window)

  def _count(self, splices: int) -> None:
    self.done += splices
    self.runs += 1

  # --- compiling ----------------------------------------------------------

  def compile_alone(self, size: int, streams: int) -> None:
    """Compiles splices of a size, and with the largest what rows need."""
    one, last = self._nothing(size, 0), size == self._sizes[-1]
    held, stood = self._cache(0).read(0)
    if last:
      self._cache(0).replace(0, held, stood)
      for cache in map(self._cache, range(streams)):
        cache.permute(0, np.arange(cache.slots))
    if self._spread.mesh is not None:
      return
    out = kv_slots.splice(
      self._params, self._config, held, one.slots, *one.inputs,
      one.positions, one.visible, self._sizes[-1])
    for cache in map(self._cache, range(streams if last else 0)):
      cache.read(0, self._window)
      cache.write(0, one.slots, out.keys, out.values,
                  one.positions[: cache.slots])

  def compile_together(self, size: int, streams: int) -> None:
    """The same of several rows; none where no splices run together."""
    if self._spread.mesh is None and self.width == 1:
      return
    for stream in range(streams):
      one, cache = self._nothing(size, stream), self._cache(stream)
      out = self._run_rows(cache, [one])
      kv_slots.hidden_of(self._spread.at_home(out.hidden), np.int32(0))
      if size == self._sizes[-1]:
        cache.write_rows(
          [0], [one.slots], out.keys, out.values, [one.positions])
        if self._spread.mesh is None:  # several rows' moves are apart there
          orders = np.tile(np.arange(cache.slots), (2, 1))
          cache.arrange([0, 1], orders, np.zeros_like(orders))

  def _nothing(self, size: int, stream: int) -> Splice:
    places = np.zeros(self._cache(stream).slots, np.int32)
    inputs = Inputs(
      np.zeros(size, np.int32),
      np.zeros((size, self._config.d_model), np.float32), np.zeros(size, bool))
    return Splice(stream, 0, self._padded(places[:0], size), inputs, places,
                  places.astype(bool), False)
