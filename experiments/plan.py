"""Prints what a GistNet run would take on every device; takes no memory.

  python -m experiments.plan --base=FOLDER --mesh=1,8,8 --config=gistnet

A base needs no more than its config.json. The mesh is data,fsdp,tensor; batch
and sizes come from the configuration. tools/plan does the same.
"""

from absl import flags

from mcjax.base.load import load_decoder_config
from mcjax.cli import commands
from mcjax.types import McjaxError

_CONFIG = commands.ConfigFlag(__file__, "gistnet")
_BASE = flags.DEFINE_string(
  "base", "", "Folder, config.json, .gguf or name; the configuration's if "
  "empty.")
_MESH = flags.DEFINE_list("mesh", ["1", "1", "1"], "data,fsdp,tensor")
_COMPILE = flags.DEFINE_bool(
  "compile", False, "Also compile the first step, for as many devices of this "
  "machine: XLA_FLAGS=--xla_force_host_platform_device_count=8.")
_WINDOW = flags.DEFINE_integer("window", 2048, "Slots of the context.", 1)


def main(argv) -> None:
  del argv
  import jax

  from mcjax.parallel import sharding
  from mcjax.training import plan
  from mcjax.training.gist import run_config

  c = _CONFIG.value
  try:
    data, fsdp, tensor = map(int, _MESH.value)
  except ValueError as error:
    raise McjaxError("--mesh must be three numbers data,fsdp,tensor, got "
                     + ",".join(_MESH.value)) from error
  base = load_decoder_config(_BASE.value or c.base)
  train = run_config.read_config(c.train, c.objective, c.phases)
  print(plan.table(plan.plan(
    base, plan.abstract_mesh(data, fsdp, tensor), train, c.gistnet, c.dtype,
    _WINDOW.value)))
  if _COMPILE.value:
    size = plan.compiled_bytes(
      base, sharding.make_mesh(data, fsdp, tensor), train, c.gistnet, c.dtype)
    print(f"activations and intermediate results: {size / 2**30:.3f} GiB a "
          f"device, compiled for {jax.default_backend()}")


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
