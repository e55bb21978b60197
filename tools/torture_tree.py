"""Kills writers of trees and checks what they leave; see tools/torture_tree."""

from __future__ import annotations

import pathlib
import shutil
import sys
import tempfile

from absl import app, flags, logging
from tqdm import tqdm

from mcjax.testing import torture

_KILLS = flags.DEFINE_integer("kills", 1000, "Processes to kill.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what they write.")


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  calls, outcomes = torture.can_trace(), []
  folder = pathlib.Path(tempfile.mkdtemp(prefix="torture-"))
  kills = torture.torture(str(folder), _KILLS.value, _SEED.value, calls)
  for outcome in tqdm(kills, total=_KILLS.value, disable=None):
    outcomes.append(outcome)
    if outcome.found != "ok":
      print(f"killed in {outcome.doing}: {outcome.found}", file=sys.stderr)
  print(torture.table(outcomes))
  bad = sum(outcome.found != "ok" for outcome in outcomes)
  how = "at moments and system calls" if calls else "at moments"
  print(f"{len(outcomes)} kills {how}, {bad} with damage"
        + (f"; see {folder}" if bad else ""))
  if not bad:
    shutil.rmtree(folder)
  sys.exit(1 if bad else 0)


if __name__ == "__main__":
  app.run(main)
