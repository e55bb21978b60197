"""A table of systems: means with intervals, and differences to one of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from mcjax.evaluation.report.intervals import of_difference, of_mean
from mcjax.evaluation.report.writer import Report, Table


class Column(NamedTuple):
  """A figure of every system.

  Attributes:
    key: of the outcome in a row, and of the figure.
    title: of the column.
    unit: of the figure.
    compare: the paired difference to the reference stands beside it.
    digits: behind the point.
  """

  key: str
  title: str
  unit: str = "share"
  compare: bool = False
  digits: int = 2


Rows = Sequence[Mapping]  # outcomes of one system, a question each


def add_table(report: Report, title: str, prefix: str,
              columns: Sequence[Column], systems: Mapping[str, Rows],
              reference: str, group: str = "group") -> None:
  """Adds figures PREFIX/SYSTEM/KEY, their intervals and n, and a table.

  Args:
    report: gets them.
    title: of the table.
    prefix: of the figures' names.
    columns: what to show.
    systems: {name: outcomes}, the same questions in the same order.
    reference: the system that the others are compared with.
    group: key of an outcome that says what is drawn as a whole.
  """
  titles = ["system", "n"]
  for column in columns:
    titles.append(column.title)
    if column.compare:
      titles.append(f"− {reference}")
  rows = []
  for name, outcomes in systems.items():
    cells: list[str | int | None] = [name, len(outcomes)]
    for column in columns:
      mine, groups = _values(outcomes, column.key), _groups(outcomes, group)
      figure = f"{prefix}/{name}/{column.key}"
      shape = column.unit, column.digits, "outcomes"
      cells.append(report.add_found(figure, of_mean(mine, groups), *shape))
      if column.compare:
        theirs = _values(systems.get(reference, ()), column.key)
        found = None
        if name != reference and len(theirs) == len(mine):
          found = of_difference(mine, theirs, groups)
        cells.append(report.add_found(
          f"{figure}/minus/{reference}", found, *shape))
    rows.append(cells)
  report.tables.append(Table(title, titles, rows))


def _values(outcomes: Rows, key: str) -> list[float]:
  return [float("nan") if o.get(key) is None else float(o[key])
          for o in outcomes]


def _groups(outcomes: Rows, group: str) -> list[Hashable]:
  return [o.get(group, i) for i, o in enumerate(outcomes)]
