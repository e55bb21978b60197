"""Trains a LensNet: python -m experiments.train_lensnet --config=… --workdir=…

Makes windows from training text and natural questions, whose answers are known
by construction, then trains on them. Windows and checkpoints are kept in the
workdir, so the same command resumes; SIGTERM or Ctrl-C leaves a checkpoint and
exits with status 75. With --distributed one of many processes, which share the
windows and the workdir.
"""

from absl import flags

from mcjax.base.load import load_base_lm
from mcjax.cli import commands, training
from mcjax.gist.encoder import load_gistnet
from mcjax.lens.weights import read_initial
from mcjax.parallel.places import place
from mcjax.training.common import data
from mcjax.training.lens import run as lens_run

_CONFIG = commands.ConfigFlag(__file__, "lensnet")
_WORKDIR = commands.define_workdir("Windows, checkpoints, metrics.")
_EXPORT = flags.DEFINE_string("export", None, "Write the final weights there.")


def main(argv) -> bool:
  del argv
  c = _CONFIG.value
  workdir = place(_WORKDIR.value)
  training.keep_programs(_WORKDIR.value)
  settings = lens_run.read_config(c.to_dict())
  lm = load_base_lm(c.base, dtype=c.dtype)
  stores = {split: data.open_split(c.data, split, lm=lm)
            for split in ("train", "validation")}
  run = lens_run.LensRun(
    lm, load_gistnet(lm, c.gistnet or None), settings, stores, workdir,
    read_initial(lm, c.initial or None))
  done = run.run()
  if done and _EXPORT.value:
    run.export(_EXPORT.value, {"config": c.to_dict()})
  return done


def cli() -> None:
  training.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
