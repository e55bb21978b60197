"""The focus as text: which documents are seen at which level of detail, and
which of their sentences an answer was read from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mcjax.runtime.documents import Source
from mcjax.types import Entry


class Section(NamedTuple):
  """Tokens [start, stop) of the history and what they are."""

  name: str
  start: int
  stop: int


def focus_map(
  focus: Sequence[Entry], sections: Sequence[Section], width: int = 48,
  most: int = 12,
) -> str:
  """Renders the focus as one line per section that is seen in detail.

  Each line shows the section cut into `width` cells; a cell holds the finest
  level seen in it (0 raw tokens, 1 gists of 32, 2 gists of 1,024 ...), then
  the token spans at L0. Sections seen at L2 and coarser only are counted.

  Args:
    focus: the tiling, from `MegaContext.focus`.
    sections: in timeline order.
    width: cells per line.
    most: lines at most, those with most raw tokens first.
  """
  starts = np.array([e.start for e in focus], np.int64)
  stops = np.array([e.stop for e in focus], np.int64)
  levels = np.array([e.level for e in focus], np.int64)
  rows, coarse = [], 0
  for section in sections:
    inside = (starts < section.stop) & (stops > section.start)
    if not np.any(inside) or section.stop <= section.start:
      continue
    raw = inside & (levels == 0)
    if levels[inside].min() > 1:
      coarse += 1
      continue
    cells = _cells(section, starts[inside], stops[inside], levels[inside],
                   width)
    tokens = int(np.sum(raw))
    rows.append((tokens, f"  {_short(section.name)} [{cells}] "
                 f"{_spans(section, starts[raw], stops[raw])}"))
  shown = sorted(rows, key=lambda row: -row[0])[:most]
  lines = [line for _, line in shown]
  counts = np.bincount(levels, minlength=3)
  covered = np.bincount(levels, weights=(stops - starts).astype(float),
                        minlength=3)
  head = "  ".join(
    f"L{l}: {int(c):,} entries for {int(t):,} tokens"
    for l, (c, t) in enumerate(zip(counts, covered)) if c
  )
  more = len(rows) - len(shown)
  rest = [f"{more} more in part at L1"] if more else []
  rest += [f"{coarse} only at L2 and coarser"] if coarse else []
  tail = [f"  ({'; '.join(rest)})"] if rest else []
  return "\n".join([f"  {head}", *lines, *tail])


def source_lines(sources: Sequence[Source]) -> str:
  """Renders passages, a line each: document, score, text.

  Args:
    sources: from `Generation.sources` or `MegaContext.search`.
  """
  lines = []
  for s in sources:
    name = s.document or "(conversation)"
    text = " ".join(s.text.split())
    lines.append(f"  {_short(name)} {s.score:4.2f} {text}")
  return "\n".join(lines or ["  all raw text of the window"])


def _short(name: str, width: int = 28) -> str:
  """A name in so many columns; of a longer one the end, with a mark."""
  short = name if len(name) <= width else "…" + name[1 - width :]
  return f"{short:<{width}}"


def _cells(section, starts, stops, levels, width) -> str:
  edges = np.linspace(section.start, section.stop, width + 1)
  out = []
  for a, b in zip(edges[:-1], edges[1:]):
    hit = (starts < max(b, a + 1)) & (stops > a)
    out.append(str(int(levels[hit].min())) if np.any(hit) else " ")
  return "".join(out)


def _spans(section, starts, stops) -> str:
  """Runs of raw tokens, as offsets within the section."""
  if not len(starts):
    return ""
  cuts = np.flatnonzero(starts[1:] != stops[:-1])
  first = np.concatenate([[0], cuts + 1])
  last = np.concatenate([cuts, [len(starts) - 1]])
  runs = [
    f"{max(starts[a], section.start) - section.start:,}-"
    f"{min(stops[b], section.stop) - section.start:,}"
    for a, b in zip(first, last)
  ]
  more = f" +{len(runs) - 4}" if len(runs) > 4 else ""
  return "L0 " + ", ".join(runs[:4]) + more
