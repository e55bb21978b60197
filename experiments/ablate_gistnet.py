"""GistNet's ablations: python -m experiments.ablate_gistnet --workdir=…

Every ablation is a run of `train_gistnet` in its own folder of the workdir, on
the same windows in the same order; finished ones are not run again. SIGTERM or
Ctrl-C leaves a checkpoint. The table of all finished ones goes to results.md.
Processes with other --config.names may share a workdir, and an accelerator.
"""

from experiments.configs import gistnet_ablation
from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.parallel.places import local
from mcjax.training.gist import ablations

_CONFIG = commands.ConfigFlag(__file__, "ablations")
_WORKDIR = commands.define_workdir("A folder per ablation.")


def main(argv) -> None:
  del argv
  c = _CONFIG.value
  workdir = local(_WORKDIR.value)
  known = list(gistnet_ablation.ABLATIONS)
  runs = {name: gistnet_ablation.get_config(name, c.steps, c.batch)
          for name in c.names or known}
  use_compilation_cache(workdir / "compiled")
  lm = load_base_lm(c.base, dtype=c.dtype)
  for name, one in runs.items():
    one.train.micro_batch, one.data = c.micro_batch, c.data
    if not ablations.run(lm, name, one, workdir):
      return
    found = ablations.table(workdir, known)
    (workdir / "results.md").write_text(found, encoding="utf-8")
    print(ablations.table(workdir, [name]).splitlines()[-1], flush=True)


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
