"""Runs one evaluation.

  python -m experiments.evaluate --config=experiments/configs/evaluate/focus.py
  python -m experiments.evaluate --config=evaluate/focus:quick \
    --config.window=1024 --config.policies=lensnet,similarity

":quick" takes small sizes; evaluate/all_small and evaluate/all run every suite.
What was finished in the workdir is kept, so that the same command goes on where
it stopped. Writes results.json, results.md, plots and report.html.
"""

from absl import flags

from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.cli import commands
from mcjax.evaluation import runner, together
from mcjax.parallel.places import local

_CONFIG = commands.ConfigFlag(__file__, "")
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Where results go; runs/SUITE if empty.")


def main(argv) -> None:
  del argv
  values = _CONFIG.value.to_dict()
  suite = values.pop("suite")
  folder = local(_WORKDIR.value or f"runs/{suite}")
  use_compilation_cache(folder.parent / "compiled")
  if suite == "all":
    together.run(values["suites"], folder, values["only"])
  else:
    runner.run(suite, values, folder)
  print((folder / "results.md").read_text(encoding="utf-8"))


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
