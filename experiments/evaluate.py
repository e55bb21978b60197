"""Runs one evaluation: python -m experiments.evaluate --suite=NAME --workdir=…

Suites: overhead, ttft, ingest, drift, substitution, ceiling, visible, focus.
Writes results.json, results.md and plots into the workdir. `--quick` takes
small sizes; a setting of the suite is changed by
`--set=window=1024,histories=8192:32768`.
"""

import pathlib

from absl import app, flags

from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.cli import commands
from mcjax.evaluation import runner as suites

_SUITE = flags.DEFINE_enum("suite", None, sorted(suites.NAMES), "What to run.")
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Where results go; runs/SUITE if empty."
)
_QUICK = flags.DEFINE_boolean("quick", False, "Small sizes, a first look.")
_SET = flags.DEFINE_list("set", [], "Settings as name=value; lists as a:b:c.")
flags.mark_flag_as_required("suite")


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument: {argv[1]}")
  with commands.one_line_errors():
    folder = pathlib.Path(_WORKDIR.value or f"runs/{_SUITE.value}")
    use_compilation_cache(folder.parent / "compiled")
    suites.run(_SUITE.value, folder, quick=_QUICK.value, changes=_SET.value)
    print((folder / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
