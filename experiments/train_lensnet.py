"""Trains a LensNet: python -m experiments.train_lensnet --config=… --workdir=…

Every round labels windows that the policy of the round before reaches, and
trains on all labels so far. Labelled tasks and checkpoints are kept in the
workdir, so the same command resumes; SIGTERM or Ctrl-C leaves a checkpoint and
exits with status 75. With --distributed one of many processes, which share the
tasks and the workdir.
"""

import pathlib

from absl import flags

from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.base.load import load_base_lm
from mcjax.cli import commands, training
from mcjax.gist.encoder import load_gistnet
from mcjax.training.common import data
from mcjax.training.lens import rounds as lens_rounds

_CONFIG = commands.ConfigFlag(__file__, "lensnet")
_WORKDIR = commands.define_workdir("Labels, checkpoints, metrics.")
_EXPORT = flags.DEFINE_string("export", None, "Write the final weights there.")


def main(argv) -> bool:
  del argv
  c = _CONFIG.value
  workdir = pathlib.Path(_WORKDIR.value)
  use_compilation_cache(workdir / "compiled")
  settings = lens_rounds.read_config(c.to_dict())
  lm = load_base_lm(c.base, dtype=c.dtype)
  encoder = load_gistnet(lm, c.gistnet or None)
  stores = data.open_split(c.data, "train")
  rounds = lens_rounds.LensRounds(lm, encoder, settings, stores, workdir)
  done = rounds.run()
  if done and _EXPORT.value:
    rounds.export(_EXPORT.value, {"config": c.to_dict()})
  return done


def cli() -> None:
  training.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
