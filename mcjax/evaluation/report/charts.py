"""Charts of a report: what they show, and how they become PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
import re
import sys
from typing import Any, NamedTuple


class Chart(NamedTuple):
  """Lines.

  Attributes:
    title: above; also names the file.
    x: label.
    y: label.
    series: legend to (xs, ys).
    log_x: logarithmic axis.
    log_y: logarithmic axis.
  """

  title: str
  x: str
  y: str
  series: Mapping[str, tuple[list, list]]
  log_x: bool = False
  log_y: bool = False


class HeatMap(NamedTuple):
  """A value for every row and column, as accuracy by length and depth.

  Attributes:
    title: above; also names the file.
    x: label of the columns.
    y: label of the rows.
    columns: names.
    rows: names.
    values: [row][column]; None where nothing was measured.
    low: value of the palest colour.
    high: value of the strongest.
  """

  title: str
  x: str
  y: str
  columns: Sequence[str]
  rows: Sequence[str]
  values: Sequence[Sequence[float | None]]
  low: float = 0.0
  high: float = 1.0


def file_name(title: str) -> str:
  """A PNG's name for a title."""
  return re.sub(r"[^\w.=+-]+", "-", title.lower()).strip("-")[:80] + ".png"


def draw(folder: pathlib.Path, charts: Sequence[Chart],
         heat_maps: Sequence[HeatMap]) -> None:
  """Draws every chart into a PNG; says so where matplotlib is missing."""
  for c in charts:
    plot_lines(folder / file_name(c.title), c.series, c.x, c.y, c.title,
               log_x=c.log_x, log_y=c.log_y)
  for m in heat_maps:
    plot_heat(folder / file_name(m.title), m)


def plot_lines(path: pathlib.Path, series: Mapping[str, tuple[list, list]],
               x: str, y: str, title: str, *, log_x: bool = False,
               log_y: bool = False) -> bool:
  """Draws lines into a PNG; says so and returns False without matplotlib.

  Args:
    path: of the file.
    series: legend to (xs, ys).
    x: label.
    y: label.
    title: above.
    log_x: logarithmic axis.
    log_y: logarithmic axis.
  """
  pyplot = _pyplot(path)
  if pyplot is None:
    return False
  figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
  for name, (xs, ys) in series.items():
    axes.plot(xs, ys, marker="o", label=name)
  axes.set(xlabel=x, ylabel=y, title=title)
  if log_x:
    axes.set_xscale("log", base=2)
  if log_y:
    axes.set_yscale("log")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
  return True


def plot_heat(path: pathlib.Path, heat_map: HeatMap) -> bool:
  """Draws a heat map into a PNG; says so and returns False without."""
  pyplot = _pyplot(path)
  if pyplot is None:
    return False
  m = heat_map
  values = [[float("nan") if v is None else v for v in row] for row in m.values]
  figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
  image = axes.imshow(values, vmin=m.low, vmax=m.high, cmap="viridis",
                      aspect="auto")
  axes.set(xlabel=m.x, ylabel=m.y, title=m.title)
  axes.set_xticks(range(len(m.columns)), m.columns)
  axes.set_yticks(range(len(m.rows)), m.rows)
  for r, row in enumerate(m.values):
    for c, value in enumerate(row):
      if value is not None:
        dark = value < (m.low + m.high) / 2
        axes.text(c, r, f"{value:.2f}", ha="center", va="center",
                  color="white" if dark else "black")
  figure.colorbar(image)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
  return True


def _pyplot(path: pathlib.Path) -> Any:
  try:
    import matplotlib
  except ImportError:
    print(f"no plot {path.name}: pip install 'mcjax[plots]' brings matplotlib",
          file=sys.stderr)
    return None
  matplotlib.use("Agg")
  from matplotlib import pyplot

  return pyplot
