"""Fits how LensNet's sentences are chosen: python -m experiments.train_reader
--config=… --workdir=… --export=FILE

Given a trained LensNet: which sentences of the blocks that it wishes for tell
the answer. Candidates are kept in the workdir, so the same command resumes.
"""

from absl import flags

from mcjax.cli import commands, training
from mcjax.training.lens import reader_run

_CONFIG = commands.ConfigFlag(__file__, "reader")
_WORKDIR = commands.define_workdir("Candidates.")
_EXPORT = flags.DEFINE_string("export", None, "Write the final weights there.")


def main(argv) -> bool:
  del argv
  c = _CONFIG.value

  def start(*parts) -> reader_run.ReaderRun:
    return reader_run.ReaderRun(*parts, c.lensnet or None, c.carry_from)

  return training.run_lens(
    c, _WORKDIR.value, reader_run.read_config, start, _EXPORT.value)


def cli() -> None:
  training.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
