"""Alternates GistNet and LensNet: python -m experiments.alternate --workdir=…

Every phase resumes from the workdir; SIGTERM or Ctrl-C leaves a checkpoint
and exits with status 75.
At the end results.md tells, per cycle, what both networks reach on the same
validation text and windows: whether alternating helped.
"""

from mcjax.base.load import load_base_lm
from mcjax.cli import commands, training
from mcjax.gist import weights as gist_weights
from mcjax.lens.weights import read_initial
from mcjax.parallel import processes
from mcjax.parallel.places import place
from mcjax.training import alternating
from mcjax.training.common import data
from mcjax.training.gist import trainer as gist_trainer
from mcjax.training.lens import run as lens_run

_CONFIG = commands.ConfigFlag(__file__, "alternate")
_WORKDIR = commands.define_workdir("Phases and the report.")


def main(argv) -> bool:
  del argv
  c = _CONFIG.value
  workdir = place(_WORKDIR.value)
  training.keep_programs(_WORKDIR.value)
  g = c.gist
  train = gist_trainer.read_config(g.train, g.objective, g.phases)
  lens = lens_run.read_config(c.lens.to_dict())
  lm = load_base_lm(c.base, dtype=c.dtype)
  initial, config, _ = gist_weights.start(
    lm, g.gistnet, c.initial or gist_weights.shipped_for(lm) or "", train.seed)
  stores, mixture = data.open_mixture(c.data, g.mixture, g.kinds, lm)
  run = alternating.Alternation(
    lm, config, train, lens, c.cycles, stores,
    data.open_split(c.data, "validation"), workdir, initial, mixture,
    read_initial(lm)[0])
  done = run.run()
  if done and processes.is_first():
    print((workdir / "results.md").read_text(encoding="utf-8"))
  return done


def cli() -> None:
  training.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
