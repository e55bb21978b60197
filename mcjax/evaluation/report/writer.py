"""What every evaluation leaves behind: results.json, a table, plots.

`results.json` holds figures with their units, the settings, the versions, the
git commit and the device, so that a number can be traced to what made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any, NamedTuple, TypeVar

import jax
from tqdm import tqdm

from mcjax.evaluation.report import charts, page
from mcjax.evaluation.report.charts import Chart, HeatMap
from mcjax.evaluation.report.intervals import Interval
from mcjax.types import McjaxError

Item = TypeVar("Item")
SECTION = "section.json"  # what report.html shows, to be joined with others
_PACKAGES = ("mcjax", "jax", "jaxlib", "numpy", "flax", "tensorstore",
             "transformers", "torch")


class Figure(NamedTuple):
  """A measured value.

  Attributes:
    value: the number, or what else was found.
    unit: of the number.
    n: how many cases it is of, where it is of several.
    interval: 95 %, low and high, where it has one.
  """

  value: float | int | str | None
  unit: str = ""
  n: int | None = None
  interval: tuple[float, float] | None = None

  def record(self) -> dict[str, Any]:
    """As JSON; what is not known is left out."""
    out: dict[str, Any] = {"value": _rounded(self.value), "unit": self.unit}
    if self.n is not None:
      out["n"] = self.n
    if self.interval is not None:
      out["interval"] = [_rounded(x) for x in self.interval]
    return out


class Table(NamedTuple):
  """Rows for a reader; cells are strings or numbers."""

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence]


@dataclasses.dataclass
class Report:
  """The outcome of one evaluation.

  Attributes:
    name: of the evaluation.
    settings: what it was run with.
    figures: name to `Figure`.
    tables: in order.
    notes: sentences below the tables.
    charts: lines, a PNG each and drawn in the page.
    heat_maps: the same.
  """

  name: str
  settings: Mapping
  figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
  tables: list[Table] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  charts: list[Chart] = dataclasses.field(default_factory=list)
  heat_maps: list[HeatMap] = dataclasses.field(default_factory=list)

  def add(self, name: str, value, unit: str = "") -> None:
    """Adds a figure."""
    self.figures[name] = Figure(value, unit)

  def add_interval(self, name: str, value: float, low: float, high: float,
                   unit: str = "", digits: int = 3, n: int | None = None
                   ) -> str:
    """Adds a figure, NAME/low and NAME/high; returns a cell for a table.

    A single case (n=1) has no interval, and no low and high.
    """
    if n == 1:
      self.figures[name] = Figure(value, unit, n)
      return f"{value:.{digits}f} (n=1)"
    self.figures[name] = Figure(value, unit, n, (low, high))
    self.add(f"{name}/low", low, unit)
    self.add(f"{name}/high", high, unit)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

  def add_found(self, name: str, found: Interval | None, unit: str = "share",
                digits: int = 2, counted: str = "") -> str | None:
    """Adds a mean with its interval; returns a cell for a table.

    Args:
      name: of the figure.
      found: the mean; None where nothing was measured, then nothing is added.
      unit: of the figure.
      digits: behind the point, in the cell.
      counted: what the mean is of; given, NAME/n is a figure of that unit.
    """
    if found is None:
      return None
    if counted:
      self.add(f"{name}/n", found.n, counted)
    return self.add_interval(name, found.value, found.low, found.high, unit,
                             digits, found.n)

  def write(self, folder: str | os.PathLike) -> pathlib.Path:
    """Writes results.json, results.md, plots and report.html.

    Returns:
      The folder.

    Raises:
      McjaxError: the folder cannot be written.
    """
    path = make_folder(folder)
    record = {
      "evaluation": self.name,
      "figures": {k: v.record() for k, v in self.figures.items()},
      "config": _plain(self.settings),
      **environment(),
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (path / "results.json").write_text(text, encoding="utf-8")
    (path / "results.md").write_text(self.markdown(record), encoding="utf-8")
    charts.draw(path, self.charts, self.heat_maps)
    shown = page.section(self)
    (path / SECTION).write_text(json.dumps(shown), encoding="utf-8")
    (path / "report.html").write_text(page.html([shown], record), "utf-8")
    return path

  def markdown(self, record: Mapping) -> str:
    """The tables, the notes, and where the numbers come from."""
    parts = [f"# {self.name}", ""]
    for table in self.tables:
      parts += [f"## {table.title}", "", *markdown_table(table), ""]
    parts += [*(f"- {note}" for note in self.notes), ""] if self.notes else []
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    parts.append(
      f"Commit {record['commit']}, {record['date']}, "
      f"{record['device']['kind']} ({record['device']['count']} device(s), "
      f"{record['device']['host_cores']} host cores); {versions}."
    )
    return "\n".join(parts) + "\n"


def cell(folder: str | os.PathLike, name: str, settings: Mapping,
         measure: Callable[[], Any]) -> Any:
  """`measure()`, or what it returned in a run before with equal settings.

  So a long suite that was cut off goes on where it stopped.

  Args:
    folder: of the suite; the cell is `folder/NAME.json`.
    name: of the cell.
    settings: everything that the measurement depends on, plain values.
    measure: returns plain values.
  """
  path = pathlib.Path(folder) / f"{name}.json"
  asked = json.loads(json.dumps(settings))
  saved = json.loads(path.read_text()) if path.exists() else {}
  if saved.get("settings") != asked:
    progress(name)
    saved = {"settings": asked, "result": measure()}
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(saved), encoding="utf-8")
    scratch.replace(path)
  return json.loads(json.dumps(saved["result"]))


def markdown_table(table: Table) -> list[str]:
  """The lines of a Markdown table."""
  lines = ["| " + " | ".join(table.columns) + " |",
           "|" + " --- |" * len(table.columns)]
  for row in table.rows:
    lines.append("| " + " | ".join(_cell(cell) for cell in row) + " |")
  return lines


def environment() -> dict:
  """Versions, git commit, date and device of this process."""
  versions = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  device = jax.devices()[0]
  return {
    "versions": versions,
    "commit": git_commit(),
    "date": datetime.date.today().isoformat(),
    "device": {
      "platform": device.platform,
      "kind": device.device_kind if device.platform != "cpu" else cpu_name(),
      "count": jax.device_count(),
      "host_cores": len(os.sched_getaffinity(0))
      if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    },
  }


def git_commit() -> str:
  """Commit of the source tree, marked if it has changes; else "unknown"."""
  here = pathlib.Path(__file__).parent
  def git(*args: str) -> str:
    return subprocess.run(
      ["git", "-C", str(here), *args], capture_output=True, text=True,
      check=True, timeout=20,
    ).stdout.strip()
  try:
    dirty = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def cpu_name() -> str:
  """The processor's name where the system tells it, else its architecture."""
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def make_folder(folder: str | os.PathLike) -> pathlib.Path:
  """Makes a folder for results.

  Raises:
    McjaxError: it cannot be made.
  """
  path = pathlib.Path(folder)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise McjaxError(f"cannot make {path}: {error.strerror}") from error
  return path


def median(values: Sequence[float]) -> float:
  """Median of at least one value."""
  return float(statistics.median(values))


def ratio_median(above: Sequence[float], below: Sequence[float]) -> float:
  """Median over repeats of above[i] / below[i], taken side by side."""
  return median([a / b for a, b in zip(above, below, strict=True)])


def progress(text: str) -> None:
  """Tells on standard error what a long evaluation does."""
  print(text, file=sys.stderr, flush=True)


def watched(items: Iterable[Item]) -> Iterable[Item]:
  """The items; a terminal shows how many are done, and the time left."""
  return tqdm(items, leave=False, disable=None)


def _cell(value) -> str:
  if value is None:
    return "–"
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
  return f"{value:,}" if isinstance(value, int) else str(value)


def _rounded(value):
  if isinstance(value, float):
    return float(f"{value:.6g}") if value == value else None
  return value


def _plain(value):
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return _plain(dataclasses.asdict(value))
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value
