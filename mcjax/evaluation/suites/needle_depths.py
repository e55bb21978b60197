"""Accuracy by length and depth: a table of every system, a heat map of each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from mcjax.evaluation.report.intervals import of_mean
from mcjax.evaluation.report.writer import HeatMap, Report, Table

QUARTERS = {"0-0.25": "0–¼", "0.25-0.5": "¼–½", "0.5-0.75": "½–¾",
            "0.75-1": "¾–1"}


class Hit(NamedTuple):
  """What became of one needle.

  Attributes:
    column: where it lay, an index of the table's depths.
    value: in [0, 1], 1 where it was found.
    group: of needles that are drawn as a whole, as those of one sample.
  """

  column: int
  value: float
  group: Hashable


def quarter(depth: float) -> int:
  """The index in QUARTERS of a depth in [0, 1]."""
  return min(int(depth * len(QUARTERS)), len(QUARTERS) - 1)


def add(report: Report, title: str, kind: str, depths: Mapping[str, str],
        hits: Mapping[int, Mapping[str, Sequence[Hit]]], main: str, said: str,
        counted: str = "samples") -> None:
  """Adds a table, its figures, and a heat map of every system with a value.

  Args:
    report: gets them.
    title: names the needles.
    kind: the same in a figure's name.
    depths: {in a figure's name: in a title}, from the beginning to the end.
    hits: {tokens of the history: {system: its needles}}.
    main: the figure's name.
    said: the same in words.
    counted: what n counts.
  """
  shares: dict[str, dict[int, list]] = {}
  rows = []
  for length, systems in hits.items():
    for name, mine in systems.items():
      found = [of_mean([h.value for h in mine if h.column == at],
                       [h.group for h in mine if h.column == at])
               for at in range(len(depths))]
      shares.setdefault(name, {})[length] = [f and f.value for f in found]
      rows.append([f"{length:,}", name, *(
        report.add_found(f"{length}/{kind}/{name}/depth {depth}/{main}", f,
                         counted=counted)
        for depth, f in zip(depths, found))])
  report.tables.append(Table(
    f"{title} by depth",
    ("tokens", "system", *(f"depth {d}" for d in depths.values())), rows))
  for name, by_length in shares.items():
    values = [by_length.get(length, [None] * len(depths)) for length in hits]
    if any(v is not None for row in values for v in row):
      report.heat_maps.append(HeatMap(
        f"{title}, {name}: {said}", "depth", "tokens",
        list(depths.values()), [f"{length:,}" for length in hits], values))
