"""Runs the cells of a grid, several at once, and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from mcjax.sweep import cell as one
from mcjax.sweep.grid import Cell
from mcjax.types import McjaxError

_LOOK = 0.1  # seconds between two looks at the running cells


class Experiment(NamedTuple):
  """What is run in every cell.

  Attributes:
    module: of the main.
    arguments: of every cell; "{cell}" stands for the cell's folder.
    settings: all settings before the grid's, to recognise a finished cell by.
    workdir: of the sweep.
  """

  module: str
  arguments: Sequence[str]
  settings: Mapping[str, Any]
  workdir: pathlib.Path

  def folder(self, cell: Cell) -> pathlib.Path:
    """Where a cell keeps what it makes."""
    return self.workdir / "cells" / cell.name

  def task(self, cell: Cell) -> dict[str, Any]:
    """What `mcjax.sweep.cell` reads."""
    folder = str(self.folder(cell))
    given = [a.replace("{cell}", folder) for a in self.arguments]
    return {
      "module": self.module, "values": cell.values,
      "arguments": [*given, *cell.overrides, f"--workdir={folder}"],
      "settings": {k: repr(v) for k, v in self.settings.items()}}


def run(experiment: Experiment, cells: Sequence[Cell], jobs: int = 1
        ) -> dict[str, str]:
  """Runs what is not finished; {name of a failed cell: why}.

  A cell that failed before is tried again. Where this process is stopped by
  SIGTERM or Ctrl-C, the running cells are, too.

  Raises:
    McjaxError: a finished cell was made with other settings.
  """
  waiting = [c for c in cells if not _finished(experiment, c)]
  print(f"{len(cells) - len(waiting)} of {len(cells)} cells are finished",
        file=sys.stderr, flush=True)
  running: dict[str, subprocess.Popen] = {}
  failed: dict[str, str] = {}
  before = signal.signal(signal.SIGTERM, _interrupt)
  try:
    while waiting or running:
      while waiting and len(running) < jobs:
        cell = waiting.pop(0)
        running[cell.name] = _start(experiment, cell)
      for name in [n for n, p in running.items() if p.poll() is not None]:
        reason = _outcome(experiment.workdir / "cells" / name,
                          running.pop(name))
        if reason:
          failed[name] = reason
        left = len(waiting) + len(running)
        print(f"{'failed' if reason else 'done'}: {name} ({left} left)",
              file=sys.stderr, flush=True)
      time.sleep(_LOOK)
  finally:
    signal.signal(signal.SIGTERM, before)
    for process in running.values():
      process.terminate()
    for process in running.values():
      process.wait()
  return failed


def _interrupt(*_) -> None:
  raise KeyboardInterrupt


def _finished(experiment: Experiment, cell: Cell) -> bool:
  folder = experiment.folder(cell)
  done = one.read(folder / one.DONE)
  if done is None:
    return False
  asked = experiment.task(cell)
  made, wanted = ({"module": t["module"], **t["settings"]}
                  for t in (done, asked))
  for name in sorted(made.keys() | wanted.keys()):
    if made.get(name) != wanted.get(name):
      raise McjaxError(
        f"{folder} was made with {name}={made.get(name)}, not "
        f"{wanted.get(name)}: take another --workdir, or delete it")
  return True


def _start(experiment: Experiment, cell: Cell) -> subprocess.Popen:
  folder = experiment.folder(cell)
  folder.mkdir(parents=True, exist_ok=True)
  one.write(folder / one.TASK, experiment.task(cell))
  with open(folder / one.LOG, "ab") as log:
    return subprocess.Popen(
      [sys.executable, "-m", "mcjax.sweep.cell", str(folder)],
      stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _outcome(folder: pathlib.Path, process: subprocess.Popen) -> str:
  """Why the cell failed; "" where it did not."""
  if (folder / one.DONE).exists():
    return ""
  told = one.read(folder / one.FAILED)
  if told:
    return told["reason"]
  return f"ended with status {process.returncode}; see {folder / one.LOG}"
