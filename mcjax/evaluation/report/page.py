"""A report as one HTML page that needs nothing else: no file, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import html as escaping
import json
import pathlib
from typing import Any

_PAGE = pathlib.Path(__file__).parent / "page.html"


def html(sections: Sequence[dict[str, Any]], record: Mapping[str, Any]) -> str:
  """The page.

  Args:
    sections: one a report, from `section`.
    record: of results.json: versions, commit, date and device.
  """
  title = ", ".join(s["name"] for s in sections)
  content = {"made": {k: record[k] for k in
                      ("versions", "commit", "date", "device")},
             "reports": list(sections)}
  return fill(_PAGE, title, content)


def fill(template: pathlib.Path, title: str, content) -> str:
  """A template with its title, and its data as JSON that cannot end a script.

  Raises:
    ValueError: not plain JSON, or not finite.
  """
  text = json.dumps(content, allow_nan=False).replace("</", "<\\/")
  page = template.read_text("utf-8")
  return page.replace("{{title}}", escaping.escape(title)).replace(
    "{{data}}", text.replace("<!--", "<\\u0021--"))


def section(report) -> dict[str, Any]:
  """A `writer.Report` as plain JSON."""
  return {
    "name": report.name, "notes": list(report.notes),
    "settings": {k: str(v) for k, v in dict(report.settings).items()},
    "tables": [{"title": t.title, "columns": list(t.columns),
                "rows": [[_finite(c) for c in row] for row in t.rows]}
               for t in report.tables],
    "figures": [[k, f["value"], f["unit"], f.get("n"), f.get("interval")]
                for k, f in ((k, v.record())
                             for k, v in report.figures.items())],
    "charts": [{**c._asdict(), "series": {
      k: [_listed(xs), _listed(ys)] for k, (xs, ys) in c.series.items()}}
      for c in report.charts],
    "heat_maps": [{**m._asdict(), "values": [_listed(r) for r in m.values]}
                  for m in report.heat_maps]}


def _listed(values) -> list:
  return [_finite(v) for v in values]


def _finite(value):
  """A number or text that JSON has; None for what is not finite."""
  if value is None or isinstance(value, (str, bool, int)):
    return value
  number = float(value)
  return number if abs(number) < float("inf") else None
