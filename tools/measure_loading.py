"""Peak memory of loading a base, or a random checkpoint over 8 host devices.

  python tools/measure_loading.py --base=qwen2.5-coder-1.5b
  python tools/measure_loading.py --folder=/tmp/big --gigabytes=2
  python tools/measure_loading.py --folder=/tmp/big --processes=2

The peak is the process's largest resident set since it imported everything,
less what it had then. Of a base it is told beside its weights in memory
(pages of the file that were read count as resident too), of a checkpoint over
its size.
"""

import os
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from mcjax.runtime.telemetry import peak_memory_mib

_BASE = flags.DEFINE_string("base", None, "Loaded as `load_base_lm` takes it.")
_FOLDER = flags.DEFINE_string("folder", None, "Written if not there.")
_GIGABYTES = flags.DEFINE_float("gigabytes", 2.0, "Size of the checkpoint.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes on loopback.")
_PROCESS = flags.DEFINE_integer("process", None, "For the tool itself.")
_PORT = flags.DEFINE_integer("port", 7399, "For more than one process.")


def _write(folder: pathlib.Path, gigabytes: float) -> None:
  """A random Llama of about so many bytes in bfloat16, in eight files."""
  import ml_dtypes
  import numpy as np

  from mcjax.testing import tiny_models

  d, f, layers = 2048, 5632, 8
  vocab = int((gigabytes * 1e9 / 2 - layers * (3 * d * f + 2.5 * d * d)) / d)
  config = tiny_models.CONFIGS["llama"] | dict(
    hidden_size=d, intermediate_size=f, num_hidden_layers=layers,
    num_attention_heads=16, num_key_value_heads=8,
    vocab_size=vocab // 64 * 64, tie_word_embeddings=True)
  bits = np.random.default_rng(0)

  def tensor(shape):
    values = bits.integers(0x3c00, 0x3e00, shape, np.uint16)
    return values.view(ml_dtypes.bfloat16)

  small = tiny_models.weights(config | dict(
    hidden_size=8, intermediate_size=8, vocab_size=8, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1))
  sizes = {"embed": (config["vocab_size"], d), "q": (d, d), "k": (d // 2, d),
           "v": (d // 2, d), "o": (d, d), "gate": (f, d), "up": (f, d),
           "down": (d, f)}

  def shape(name):
    found = [s for key, s in sizes.items()
             if f".{key}_" in name]
    return found[0] if found else (d,)

  tiny_models.write_folder(
    folder, config, {n: tensor(shape(n)) for n in small}, shards=8)


def _peak() -> int:
  return int(peak_memory_mib() * 2**20)


def _load_base(name: str) -> None:
  import jax

  from mcjax.base.load import load_base_lm

  before, wall, cpu = _peak(), time.perf_counter(), time.process_time()
  lm = load_base_lm(name)
  jax.block_until_ready(lm.params)
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  size = sum(a.nbytes for a in jax.tree.leaves(lm.params))
  print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU; weights {size / 1e9:.2f} "
        f"GB, peak {(_peak() - before) / 1e9:.2f} GB more than before")


def _load(folder: pathlib.Path) -> None:
  from mcjax.base.load import load_base_lm
  from mcjax.parallel import processes, sharding

  if _PROCESSES.value > 1:
    processes.join(f"127.0.0.1:{_PORT.value}", _PROCESSES.value, _PROCESS.value)
  mesh = sharding.make_mesh(1, 2, 4)
  before, size = _peak(), sum(
    p.stat().st_size for p in folder.glob("*.safetensors"))
  lm = load_base_lm(folder, dtype="bfloat16", mesh=mesh)
  peak = _peak()
  own = sum(s.data.nbytes for a in lm.params["layers"].values()
            for s in a.addressable_shards)
  print(f"process {_PROCESS.value or 0}: checkpoint {size / 1e9:.2f} GB, "
        f"before {before / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB; peak "
        f"{peak / size:.2f} of the checkpoint, {(peak - before) / size:.2f} "
        f"without what was there before; own layers {own / 1e9:.2f} GB",
        flush=True)
  processes.leave()


def main(argv) -> None:
  del argv
  if (_BASE.value is None) == (_FOLDER.value is None):
    sys.exit("error: give --base or --folder")
  if _BASE.value:
    _load_base(_BASE.value)
    return
  folder = pathlib.Path(_FOLDER.value)
  if not folder.exists():
    _write(folder, _GIGABYTES.value)
  if _PROCESS.value is not None:
    _load(folder)
    return
  count = 8 // _PROCESSES.value
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "1048576",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
  members = [
    subprocess.Popen([sys.executable, *sys.argv, f"--process={i}"],
                     env=environment)
    for i in range(_PROCESSES.value)]
  sys.exit(max(m.wait() for m in members))


if __name__ == "__main__":
  app.run(main)
