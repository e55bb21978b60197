"""Tries to break trees from outside; see tools/torture_tree."""

from __future__ import annotations

import pathlib
import shutil
import sys
import tempfile

from absl import app, flags, logging
from tqdm import tqdm

from mcjax.testing import contention, torture

_MODE = flags.DEFINE_enum(
  "mode", "kills", ["kills", "writers", "readers"], "What is done to trees.")
_KILLS = flags.DEFINE_integer("kills", 1000, "Processes to kill.")
_COMMITS = flags.DEFINE_integer("commits", 1000, "Of two writers together.")
_READERS = flags.DEFINE_integer("readers", 8, "Beside one writer.")
_SECONDS = flags.DEFINE_float("seconds", 300, "That readers read.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is written.")


def _kill(place: str) -> bool:
  calls, outcomes = torture.can_trace(), []
  kills = torture.torture(place, _KILLS.value, _SEED.value, calls)
  for outcome in tqdm(kills, total=_KILLS.value, disable=None):
    outcomes.append(outcome)
    if outcome.found != "ok":
      print(f"killed in {outcome.doing}: {outcome.found}", file=sys.stderr)
  print(torture.table(outcomes))
  bad = sum(outcome.found != "ok" for outcome in outcomes)
  by_call = sum(outcome.how == "call" for outcome in outcomes)
  print(f"{len(outcomes)} kills, {by_call} of them at a system call,"
        f" {bad} with damage")
  return not bad


def _two_writers(place: str) -> bool:
  found = contention.two_writers(f"{place}/tree", _COMMITS.value, _SEED.value)
  print(*(f"{name} {value}" for name, value in found.items()), sep=", ")
  return not found["lost"] and not found["mixed"] and (
    found["slowest_refusal_s"] < 1)


def _readers(place: str) -> bool:
  found = contention.readers(
    f"{place}/tree", _READERS.value, _SECONDS.value, _SEED.value)
  print(*(f"{name} {value}" for name, value in found.items()), sep=", ")
  return not found["torn"]


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  place = tempfile.mkdtemp(prefix="torture-")
  todo = {"kills": _kill, "writers": _two_writers, "readers": _readers}
  if not todo[_MODE.value](place):
    sys.exit(f"the trees are left in {place}")
  shutil.rmtree(pathlib.Path(place))


if __name__ == "__main__":
  app.run(main)
