"""What an engine of many histories costs: CPU time a token, memory a history.

  python tools/measure_engine.py --rows=1,4,16 --tokens=64

In engines of so many slots, each history takes in a text of its own; then all
are asked at once. Prints tokens a second of CPU, how many answers were decoded
together on average, programs called, and the bytes of live arrays that every
further history takes, beside those of its keys and values.
"""

import argparse
import gc
import threading
import time
import uuid

import jax
import numpy as np

from mcjax import Config, Engine
from mcjax.base.compilation_cache import keep_programs
from mcjax.base.load import load_base_lm
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING

_FACT = "The harbour master of Port {0} is called Captain Number {1}. "


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--base", default="smollm2-135m",
                      help='"tiny" is a random one')
  parser.add_argument("--rows", default="1,4,16")
  parser.add_argument("--window", type=int, default=1024)
  parser.add_argument("--text", type=int, default=2000, help="characters")
  parser.add_argument("--tokens", type=int, default=64, help="of an answer")
  parser.add_argument("--question", default="Who is the harbour master?")
  args = parser.parse_args()
  keep_programs()
  lm = tiny_base.make_lm() if args.base == "tiny" else load_base_lm(args.base)
  held: list[tuple[int, int]] = []
  print("rows  tokens  CPU s  wall s  tokens/CPU s  rows a block  "
        "live MiB")
  for rows in map(int, args.rows.split(",")):
    held.append((rows, _measured(lm, rows, args)))
  (few, least), (many, most) = held[0], held[-1]
  if many > few:
    each, kv = (most - least) / (many - few), _kv_bytes(lm, args.window)
    print(f"a further history: {each / 2**20:.2f} MiB, {each / kv:.3f} of its "
          f"window's keys and values ({kv / 2**20:.2f} MiB)")


def _kv_bytes(lm, window: int) -> int:
  c = lm.config
  slot = 2 * c.n_layers * c.n_kv_heads * c.head_dim
  return (window + BRANCHING) * slot * lm.params["embed"].dtype.itemsize


def _measured(lm, rows: int, args) -> int:
  config = Config(window=args.window)
  with Engine(lm, config, slots=rows) as engine:
    engine.warm_up()
    histories = [engine.create(f"memory://{uuid.uuid4().hex}/")
                 for _ in range(rows)]
    for i, mc in enumerate(histories):
      rng = np.random.RandomState(i)
      words = " ".join(map(str, rng.randint(0, 999, args.text // 4)))
      mc.ingest(f"{words[: args.text // 2]}\n{_FACT.format(i, 70 + i)}\n"
                f"{words[args.text // 2 :]}")
    engine.blocks = engine.rows = engine.tokens = 0
    cpu, wall = time.process_time(), time.perf_counter()
    threads = [threading.Thread(
      target=mc.generate, args=(args.question, args.tokens))
      for mc in histories]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    del mc
    gc.collect()
    live = sum(a.nbytes for a in jax.live_arrays())
    print(f"{rows:4} {engine.tokens:7} {cpu:6.1f} {wall:7.1f} "
          f"{engine.tokens / cpu:13.1f} {engine.rows / engine.blocks:13.1f} "
          f"{live / 2**20:9.1f}", flush=True)
  return live


if __name__ == "__main__":
  main()
