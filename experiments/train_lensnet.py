"""Trains a LensNet: python -m experiments.train_lensnet --config=… --workdir=…

Makes windows from training text and natural questions, whose answers are known
by construction, then trains on them. Windows and checkpoints are kept in the
workdir, so the same command resumes; SIGTERM or Ctrl-C leaves a checkpoint and
exits with status 75. With --distributed one of many processes, which share the
windows and the workdir.
"""

from absl import flags

from mcjax.cli import commands, training
from mcjax.lens.weights import read_initial
from mcjax.training.lens import run as lens_run

_CONFIG = commands.ConfigFlag(__file__, "lensnet")
_WORKDIR = commands.define_workdir("Windows, checkpoints, metrics.")
_EXPORT = flags.DEFINE_string("export", None, "Write the final weights there.")


def main(argv) -> bool:
  del argv
  c = _CONFIG.value

  def start(lm, *parts) -> lens_run.LensRun:
    initial, card = read_initial(lm, c.initial or None)
    return lens_run.LensRun(lm, *parts, initial, card)

  return training.run_lens(
    c, _WORKDIR.value, lens_run.read_config, start, _EXPORT.value)


def cli() -> None:
  training.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
