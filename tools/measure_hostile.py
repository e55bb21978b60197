"""What it costs to be told that a file means harm; Linux only.

  python tools/measure_hostile.py

Each case of mcjax/testing/hostile.py runs in a process of its own that has
loaded a good base and a good tree before; malformed commit records, several
hundred of them, in one more. Exit status 1 if anything takes more than 2 s of
CPU time or 200 MB, hangs, is no one-line error, or does not name what is wrong.
"""

import json
import multiprocessing
import pathlib
import sys
import tempfile
from typing import NamedTuple

from absl import app

from mcjax.evaluation.report.writer import Table, markdown_table
from mcjax.testing import hostile
from mcjax.types import McjaxError

_CPU, _SECONDS, _MIB = 2.0, 20.0, 200e6 / 2**20


class _Row(NamedTuple):
  name: str
  told: str
  seconds: float = 0.0
  cpu: float = 0.0
  mib: float = 0.0
  right: bool = False

  @property
  def passes(self) -> bool:
    return (self.right and self.seconds < _SECONDS and self.cpu < _CPU
            and self.mib < _MIB)


def _case(number: int, pipe) -> None:
  case = hostile.CASES[number]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / "good").mkdir()
    (folder / "bad").mkdir()
    hostile.load_good(folder / "good")
    try:
      cost = hostile.cost(case.prepare(folder / "bad"))
    except Exception as error:
      pipe.send(_Row(case.name, f"{error!r}"))
      return
  named = all(word in cost.told for word in case.words)
  pipe.send(_Row(case.name, cost.told.replace(name, ""), cost.seconds,
                 cost.cpu, cost.mib, named))


def _records(pipe) -> None:
  """All malformed records: what the most expensive one costs."""
  name, costs, accepted = "malformed commit records", [], []
  with tempfile.TemporaryDirectory() as folder:
    place = hostile.make_tree(pathlib.Path(folder))
    hostile.read_tree(place)
    for what, record in hostile.malformed(hostile.record_of(place)):
      hostile.write_record(place, record)
      try:
        costs.append(hostile.cost(lambda: hostile.read_tree(place)))
      except AssertionError:
        accepted.append(what)
      except Exception as error:
        pipe.send(_Row(name, f"{what}: {error!r}"))
        return
  print("records that are read:", json.dumps(accepted), file=sys.stderr)
  pipe.send(_Row(
    name, f"{len(costs)} are told; {len(accepted)} name what may be so",
    max(c.seconds for c in costs), max(c.cpu for c in costs),
    max(c.mib for c in costs), True))


def _apart(work, *args) -> _Row:
  """What `work` sends, run in a process of its own."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe(duplex=False)
  process = context.Process(target=work, args=(*args, theirs))
  process.start()
  theirs.close()
  try:
    return ours.recv()
  except EOFError:
    return _Row(work.__name__, "the process died")
  finally:
    process.join()


def main(argv) -> None:
  del argv
  rows = [_apart(_case, number) for number in range(len(hostile.CASES))]
  rows.append(_apart(_records))
  table = Table("Hostile files", ("file", "told", "s", "CPU s", "MiB"), [
    [row.name, row.told[:160], round(row.seconds, 2), round(row.cpu, 2),
     round(row.mib)] for row in rows])
  print(*markdown_table(table), sep="\n")
  if bad := [row.name for row in rows if not row.passes]:
    raise McjaxError(f"not as it must be: {', '.join(bad)}")


if __name__ == "__main__":
  app.run(main)
