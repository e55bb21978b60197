"""Fits how LensNet's sentences are chosen: python -m experiments.train_reader
--config=… --workdir=… --export=FILE

Given a trained LensNet: which sentences of the blocks that it wishes for tell
the answer. Candidates are kept in the workdir, so the same command resumes.
"""

from absl import flags

from mcjax.base.load import load_base_lm
from mcjax.cli import commands, training
from mcjax.gist.encoder import load_gistnet
from mcjax.parallel.places import place
from mcjax.training.common import data
from mcjax.training.lens import reader_run

_CONFIG = commands.ConfigFlag(__file__, "reader")
_WORKDIR = commands.define_workdir("Candidates.")
_EXPORT = flags.DEFINE_string("export", None, "Write the final weights there.")


def main(argv) -> bool:
  del argv
  c = _CONFIG.value
  workdir = place(_WORKDIR.value)
  training.keep_programs(_WORKDIR.value)
  settings = reader_run.read_config(c.to_dict())
  lm = load_base_lm(c.base, dtype=c.dtype)
  stores = {split: data.open_split(c.data, split, lm=lm)
            for split in ("train", "validation")}
  run = reader_run.ReaderRun(
    lm, load_gistnet(lm, c.gistnet or None), settings, stores, workdir,
    c.lensnet or None, c.carry_from)
  done = run.run()
  if done and _EXPORT.value:
    run.export(_EXPORT.value, {"config": c.to_dict()})
  return done


def cli() -> None:
  training.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
