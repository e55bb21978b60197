"""Many suites in one folder, and one report of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
import time
from typing import Any

from mcjax.evaluation import runner
from mcjax.evaluation.report import page
from mcjax.evaluation.report.writer import (
  SECTION,
  environment,
  make_folder,
  progress,
)
from mcjax.settings import check_names
from mcjax.types import McjaxError

_DONE = "finished.json"


def run(suites: Mapping[str, Mapping[str, Any]], folder,
        only: Sequence[str] = ()) -> None:
  """Runs every suite in its own folder; what is finished is not run again.

  Of another commit it is, as far as its cells ask for other settings or
  weights. A suite that fails is left out of the report and named at the end.

  Args:
    suites: {name of a suite: its settings}.
    folder: made if need be.
    only: these suites; all if empty.

  Raises:
    McjaxError: an unknown name; or names the suites that failed, after all
      others have run.
  """
  check_names("config.suites", only, suites)
  suites = {k: v for k, v in suites.items() if not only or k in only}
  folder = make_folder(folder)
  failed = {}
  for name, values in suites.items():
    try:
      _run_one(name, values, folder / name)
    except McjaxError as error:
      failed[name] = str(error)
      progress(f"{name} failed: {error}")
    _join(folder, [n for n in suites if (folder / n / _DONE).exists()], suites)
  if failed:
    raise McjaxError("failed: " + "; ".join(
      f"{name}: {reason}" for name, reason in failed.items()))


def _run_one(name: str, values: Mapping[str, Any], folder: pathlib.Path
             ) -> None:
  done = folder / _DONE
  asked = json.loads(json.dumps(dict(values)))
  commit = environment()["commit"]
  before = json.loads(done.read_text("utf-8")) if done.exists() else {}
  if (before.get("config"), before.get("commit")) == (asked, commit):
    progress(f"{name} is finished")
    return
  done.unlink(missing_ok=True)
  progress(f"=== {name}")
  begin, cpu = time.time(), time.process_time()
  runner.run(name, values, folder)
  done.write_text(json.dumps({
    "config": asked, "commit": commit, "seconds": round(time.time() - begin, 1),
    "cpu_seconds": round(time.process_time() - cpu, 1)}), encoding="utf-8")


def _join(folder: pathlib.Path, names: list[str], suites) -> None:
  """results.json, results.md and report.html of the finished suites."""
  figures, texts, sections = {}, [], []
  for name in names:
    record = json.loads((folder / name / "results.json").read_text("utf-8"))
    took = json.loads((folder / name / _DONE).read_text("utf-8"))
    figures |= {f"{name}/{k}": v for k, v in record["figures"].items()}
    for part in ("seconds", "cpu_seconds"):
      figures[f"{name}/cost/{part}"] = {"value": took[part], "unit": "s"}
    texts.append((folder / name / "results.md").read_text("utf-8"))
    sections.append(json.loads((folder / name / SECTION).read_text("utf-8")))
  record = {
    "evaluation": "all", "figures": figures,
    "config": {k: dict(v) for k, v in suites.items()}, **environment()}
  (folder / "results.json").write_text(
    json.dumps(record, indent=2) + "\n", encoding="utf-8")
  (folder / "results.md").write_text("\n".join(texts), encoding="utf-8")
  (folder / "report.html").write_text(page.html(sections, record), "utf-8")
