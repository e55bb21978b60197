"""One table and plots of all finished cells."""

from __future__ import annotations

from collections.abc import Sequence
import csv
import fnmatch
import json
import pathlib
from typing import Any, NamedTuple

from mcjax.evaluation.report.charts import file_name, plot_lines
from mcjax.evaluation.report.writer import Table, markdown_table
from mcjax.sweep import cell as one
from mcjax.types import McjaxError

_SHOWN = 8  # figures of the Markdown table, unless patterns choose


class Row(NamedTuple):
  """A finished cell: its settings, how long it took, and its figures."""

  values: dict[str, str]
  seconds: float
  figures: dict[str, Any]


def rows(workdir: pathlib.Path) -> list[Row]:
  """All finished cells of a sweep, of every shard, by name."""
  found = []
  for path in sorted((workdir / "cells").glob(f"*/{one.DONE}")):
    done = one.read(path)
    found.append(Row(done["values"], done["seconds"], _figures(path.parent)))
  return found


def _figures(folder: pathlib.Path) -> dict[str, Any]:
  """What a cell measured: its results, or the last training metrics."""
  results = one.read(folder / "results.json")
  if results and "figures" in results:
    return {k: v["value"] for k, v in results["figures"].items()}
  last: dict[str, Any] = {}
  metrics = folder / "metrics.jsonl"
  if metrics.exists():
    for line in metrics.read_text("utf-8").splitlines():
      last |= json.loads(line)
  return {k: v for k, v in last.items() if isinstance(v, (int, float, str))}


def write(workdir: pathlib.Path, patterns: Sequence[str] = ()) -> Table | None:
  """Writes results.csv, results.md and plots; None where nothing is finished.

  Args:
    workdir: of the sweep.
    patterns: which figures go into the Markdown table and are plotted, as in
      "H=32/recovered/*"; if empty the first ones that differ between cells.
      The CSV has all.

  Raises:
    McjaxError: a pattern fits no figure.
  """
  found = rows(workdir)
  if not found:
    return None
  axes = list(dict.fromkeys(k for row in found for k in row.values))
  names = list(dict.fromkeys(k for row in found for k in row.figures))
  with open(workdir / "results.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow([*axes, "seconds", *names])
    for row in found:
      writer.writerow(_cells(row, axes, names))
  shown = _chosen(sorted(names, key=lambda name: _is_constant(found, name)),
                  patterns)
  table = Table("Sweep", (*axes, "seconds", *shown),
                [_cells(row, axes, shown) for row in found])
  more = len(names) - len(shown)
  note = f"\n{more} more figures are in results.csv.\n" if more else ""
  (workdir / "results.md").write_text(
    "\n".join(["# Sweep", "", *markdown_table(table), ""]) + note,
    encoding="utf-8")
  for name in shown:
    _plot(workdir, found, axes, name)
  return table


def _cells(row: Row, axes, names) -> list:
  return [*(row.values.get(a) for a in axes), row.seconds,
          *(row.figures.get(n) for n in names)]


def _is_constant(found: Sequence[Row], name: str) -> bool:
  return len({str(row.figures.get(name)) for row in found}) < 2


def _chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
  chosen: list[str] = []
  for pattern in patterns:
    fits = fnmatch.filter(names, pattern)
    if not fits:
      raise McjaxError(f"--figures={pattern} fits none of the figures in "
                       "results.csv")
    chosen += fits
  return list(dict.fromkeys(chosen)) if patterns else list(names[:_SHOWN])


def _number(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None


def _plot(workdir: pathlib.Path, found: Sequence[Row], axes, name: str) -> None:
  """The figure along the first axis of numbers, a line per other setting."""
  numbers = [a for a in axes if all(
    _number(r.values.get(a, "")) is not None for r in found)]
  along = (numbers or axes)[0]
  lines: dict[str, list[tuple]] = {}
  for row in found:
    y, x = row.figures.get(name), row.values.get(along, "")
    if isinstance(y, (int, float)):
      others = [f"{a}={row.values.get(a)}" for a in axes if a != along]
      lines.setdefault(", ".join(others) or name, []).append(
        (_number(x) if numbers else x, y))
  if not lines:
    return
  (workdir / "plots").mkdir(exist_ok=True)
  plot_lines(workdir / "plots" / file_name(name), {
    k: ([x for x, _ in sorted(points)], [y for _, y in sorted(points)])
    for k, points in lines.items()}, along, name, name)
