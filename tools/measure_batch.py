"""Decoding throughput by the number of histories that are decoded together.

  python tools/measure_batch.py --rows=1,4,16,64 --entries=224,992
  python tools/measure_batch.py --splices=16 --entries=224

Runs the engine's device loop for so many rows, each attending to `entries`
cached ones, and prints wall clock and CPU time a step and tokens per second,
beside those of the first number of rows. CPU time is the figure to take on a
machine that others use too: the least of several blocks, the rows in turn.
With --splices=N it compares N splices that run together with N single ones, by
their padded size.
"""

import argparse
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import hub, model
from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.base.load import load_base_lm
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING
from mcjax.window import decode_loop, kv_slots, sampling
from mcjax.window.decode_loop import Sight
from mcjax.window.decoding import Decoder
from mcjax.window.row_cache import RowCache, near_slots
from mcjax.window.sampling import Sampling
from mcjax.window.slot_inputs import Inputs


class _Loop:
  """The device loop over made-up windows of equal length."""

  def __init__(self, lm, rows: int, entries: int):
    config, dtype = lm.config, lm.params["embed"].dtype
    capacity = entries + BRANCHING
    self._lm, self._params = lm, model.unstacked(lm.params)
    cache = RowCache(config, rows, capacity, dtype, near_slots(capacity))
    self._streams = (cache.take(),)
    places = np.tile(np.arange(capacity, dtype=np.int32), (rows, 1))
    self._sights = (Sight(
      places, places < entries, np.full(rows, entries, np.int32),
      jnp.zeros((rows, config.vocab_size)), places[:, entries:]),)
    self._seen = jnp.zeros((rows, config.vocab_size), bool)
    self._sampling = sampling.Rows(
      np.tile(sampling.numbers_of(Sampling()), (rows, 1)),
      jnp.stack([jax.random.key(0)] * rows), np.zeros(rows, np.int32),
      np.zeros((), bool))
    self.rows = rows

  def run(self, steps: int) -> tuple[float, float]:
    """Seconds of wall clock and of CPU that so many steps took."""
    begin, cpu = time.perf_counter(), time.process_time()
    self._streams, block = decode_loop.decode_rows(
      self._params, self._lm.config, self._streams, self._sights,
      np.full(self.rows, steps, np.int32),
      np.full(kv_slots.STOP_IDS, -1, np.int32), self._sampling, self._seen,
      np.zeros(self.rows, np.float32), np.zeros(self.rows, bool),
      np.int32(decode_loop.NOTHING))
    jax.block_until_ready(block.tokens)
    self._seen = block.seen
    return time.perf_counter() - begin, time.process_time() - cpu


class _Splices:
  """So many rows that all want a splice at one time."""

  def __init__(self, lm, rows: int, entries: int, together: int):
    self._lm, self._entries, self._rows = lm, entries, rows
    self.sizes = 1, *kv_slots.splice_sizes(4)
    self._window = entries + max(self.sizes)
    self._decoder = Decoder(
      lm.params, lm.config, rows, self._window, lm.params["embed"].dtype,
      np.full(kv_slots.STOP_IDS, -1, np.int32), self.sizes, together)

  def run(self, size: int) -> float:
    """Seconds of CPU that a splice of every row took."""
    d, splicer = self._lm.config.d_model, self._decoder.splicer
    places = np.arange(self._window, dtype=np.int32)
    inputs = Inputs(np.zeros(size, np.int32), np.zeros((size, d), np.float32),
                    np.zeros(size, bool))
    threads = [threading.Thread(target=self._decoder.splice, args=(
      0, row, places[self._entries :][:size], inputs,
      (places, places < self._entries + size))) for row in range(self._rows)]
    done = splicer.done
    with self._decoder.turn:
      for thread in threads:
        thread.start()
      time.sleep(0.5)  # all of them wait now
      cpu = time.process_time()
    for thread in threads:
      thread.join()
    jax.block_until_ready(self._decoder.read(0)[0])
    assert splicer.done == done + self._rows
    return time.process_time() - cpu


def _compare_splices(lm, rows: int, entries: int, repeats: int) -> None:
  kinds = [_Splices(lm, rows, entries, together) for together in (1, rows)]
  for size in kinds[0].sizes:
    times = [[kind.run(size) for kind in kinds]
             for _ in range(repeats + 1)][1:]  # the first compiles
    single, together = map(min, zip(*times))
    print(f"{entries:7} {rows:7} {size:4} {single * 1e3:13.1f} "
          f"{together * 1e3:15.1f} {together / single:5.2f}", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--base", default="smollm2-135m",
                      help='"tiny" is a random one')
  parser.add_argument("--rows", default="1,4,16")
  parser.add_argument("--entries", default="224,992")
  parser.add_argument("--steps", type=int, default=BRANCHING, help="a block")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--splices", type=int, default=0, help="see above")
  args = parser.parse_args()
  use_compilation_cache(hub.cache_dir() / "xla")
  lm = tiny_base.make_lm() if args.base == "tiny" else load_base_lm(args.base)
  if args.splices:
    print("entries  splices  size  single CPU ms  together CPU ms     x")
    for entries in map(int, args.entries.split(",")):
      _compare_splices(lm, args.splices, entries, args.repeats)
    return
  print("entries  rows  wall ms/step  CPU ms/step  tokens/s  x wall  x CPU")
  for entries in map(int, args.entries.split(",")):
    loops = [_Loop(lm, rows, entries) for rows in map(
      int, args.rows.split(","))]
    for loop in loops:
      loop.run(1)  # compiles
    times = [[loop.run(args.steps) for loop in loops]
             for _ in range(args.repeats)]
    first = None
    for loop, taken in zip(loops, zip(*times)):
      wall, cpu = (min(part) / args.steps for part in zip(*taken))
      first = first or (loop.rows / wall, loop.rows / cpu)
      print(f"{entries:7} {loop.rows:5} {wall * 1e3:13.1f} {cpu * 1e3:12.1f} "
            f"{loop.rows / wall:9.1f} {loop.rows / wall / first[0]:7.2f} "
            f"{loop.rows / cpu / first[1]:6.2f}", flush=True)


if __name__ == "__main__":
  main()
