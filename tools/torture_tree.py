"""Tries to break trees from outside; see tools/torture_tree."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import sys
import tempfile

from absl import app, flags, logging
from tqdm import tqdm

from mcjax.testing import contention, object_store, torture

_MODE = flags.DEFINE_enum(
  "mode", "kills", ["kills", "writers", "readers"], "What is done to trees.")
_KILLS = flags.DEFINE_integer("kills", 1000, "Processes to kill.")
_COMMITS = flags.DEFINE_integer("commits", 1000, "Of two writers together.")
_READERS = flags.DEFINE_integer("readers", 8, "Beside one writer.")
_SECONDS = flags.DEFINE_float("seconds", 300, "That readers read.")
_S3 = flags.DEFINE_bool(
  "s3", False, "In a bucket of moto's server on loopback instead of files.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is written.")


def _kill(place: str) -> bool:
  calls, outcomes = torture.can_trace(), []
  kills = torture.torture(place, _KILLS.value, _SEED.value, calls)
  with contextlib.suppress(KeyboardInterrupt):  # then what was seen counts
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


@contextlib.contextmanager
def _bucket():
  with object_store.serve() as environment:
    os.environ.update(environment)
    yield f"s3://{object_store.BUCKET}"


@contextlib.contextmanager
def _folder():
  """A temporary one; it stays if the program exits with an error."""
  place = tempfile.mkdtemp(prefix="torture-")
  yield place
  shutil.rmtree(pathlib.Path(place), ignore_errors=True)


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  todo = {"kills": _kill, "writers": _two_writers, "readers": _readers}
  with _bucket() if _S3.value else _folder() as place:
    if not todo[_MODE.value](place):
      sys.exit(f"damage: the trees are left in {place}")


if __name__ == "__main__":
  app.run(main)
