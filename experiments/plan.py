"""Prints what a GistNet run would take on every device; takes no memory.

  python -m experiments.plan --base=FOLDER --mesh=1,8,8 --config=gistnet \
    --config.train.batch=32 --config.train.micro_batch=8

A base needs no more than its config.json. The mesh is data,fsdp,tensor; batch
and sizes come from the configuration. tools/plan does the same.
"""

from absl import flags

from mcjax.cli import commands
from mcjax.training import plan

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
  print(plan.report(_CONFIG.value, _BASE.value, _MESH.value, _WINDOW.value,
                    _COMPILE.value))


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
