"""Runs an experiment under every setting of a grid, and puts it into a table.

  python -m experiments.sweep --config=evaluate/visible:quick \
    --grid=window=512,1024 --grid=policy=recency,similarity --workdir=runs/sweep
  python -m experiments.sweep --main=train_gistnet --config=gistnet:40 \
    --grid=train.learning_rate=1e-3,2e-3 --workdir=runs/rates

Every cell is a process of its own, --jobs of them at once. The same command
goes on where it was stopped, repeats no finished cell and tries failed ones
again. --shard=0/4 … 3/4 split it over machines with one workdir. Writes
results.csv, results.md and plots of all finished cells.
"""

import sys

from absl import flags

from mcjax.cli import commands, configs
from mcjax.parallel.places import local
from mcjax.sweep import grid, runner, table

_CONFIG = commands.ConfigFlag(__file__, "")
_WORKDIR = commands.define_workdir("A folder per cell, and the table.")
_MAIN = flags.DEFINE_string("main", "evaluate", "Which experiment is run.")
_GRID = flags.DEFINE_multi_string("grid", [], "An axis: name=value,value.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Cells at once.", 1)
_SHARD = flags.DEFINE_string("shard", "", "i/n: only every n-th cell, from i.")
_FIGURES = flags.DEFINE_list(
  "figures", [], "Figures shown, as H=32/recovered/*; else the first ones.")
_ARGUMENT = flags.DEFINE_multi_string(
  "argument", [], "More for every cell, as --export={cell}/g.safetensors.")


def main(argv) -> None:
  del argv
  cells = grid.cells(_GRID.value)
  for override in {o for cell in cells for o in cell.overrides}:
    configs.override(override, _CONFIG.value)
  workdir = local(_WORKDIR.value)
  module = _MAIN.value if "." in _MAIN.value else f"experiments.{_MAIN.value}"
  experiment = runner.Experiment(
    module, [*_CONFIG.arguments, *_ARGUMENT.value],
    configs.flat(_CONFIG.value), workdir)
  failed = runner.run(experiment, grid.shard(cells, _SHARD.value), _JOBS.value)
  if table.write(workdir, _FIGURES.value):
    print((workdir / "results.md").read_text(encoding="utf-8"))
  if failed:
    sys.exit("\n".join([f"error: {len(failed)} cells failed", *(
      f"  {name}: {reason}" for name, reason in failed.items())]))


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
