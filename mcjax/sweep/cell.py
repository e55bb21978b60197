"""One cell in a process of its own: python -m mcjax.sweep.cell FOLDER.

FOLDER/cell.json says what is run. The outcome is written by this process, so
that nothing is lost with the process that started it; a cell that is run by
another process is waited for. What is finished is not run again.
"""

from __future__ import annotations

import fcntl
import json
import pathlib
import runpy
import sys
import time
import traceback
from typing import Any

TASK, DONE, FAILED, LOG = "cell.json", "done.json", "failed.json", "log.txt"


def write(path: pathlib.Path, value: Any) -> None:
  """Writes JSON whole or not at all."""
  scratch = path.with_suffix(".part")
  scratch.write_text(json.dumps(value, indent=1), encoding="utf-8")
  scratch.replace(path)


def read(path: pathlib.Path) -> Any:
  """JSON of a file; None where there is none."""
  return json.loads(path.read_text("utf-8")) if path.exists() else None


def main(folder: pathlib.Path) -> int:
  """Runs the cell; its exit status."""
  with open(folder / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if (folder / DONE).exists():
      return 0
    task = read(folder / TASK)
    (folder / FAILED).unlink(missing_ok=True)
    begin = time.time()
    reason = _run(task["module"], task["arguments"])
    if reason:
      write(folder / FAILED, {"reason": reason})
      return 1
    write(folder / DONE, {**task, "seconds": round(time.time() - begin, 1)})
    return 0


def _run(module: str, arguments: list[str]) -> str:
  """Runs a module as a program; why it failed, or ""."""
  sys.argv = [module, *arguments]
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except SystemExit as end:
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr)
      return end.code
    return f"exit status {end.code}" if end.code else ""
  except BaseException as error:  # a cell's fault is told, whatever it is
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"
  return ""


if __name__ == "__main__":
  sys.exit(main(pathlib.Path(sys.argv[1])))
