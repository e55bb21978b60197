"""A run's telemetry as one HTML page: the focus over time, and what was read.

The page needs no other file and no network. What the spans say is kept beside
the telemetry when a run ends, or read from its tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import json
import pathlib
from typing import Any

from mcjax.evaluation.report import page
from mcjax.types import BRANCHING, McjaxError

TELEMETRY, TEXTS, PAGE = "telemetry.jsonl", "texts.json", "focus.html"
_TEMPLATE = pathlib.Path(__file__).parent / "focus_page.html"
_SHOWN = 2 * BRANCHING  # tokens shown of a span that covers more

Text = Callable[[int, int], str]


def records(run: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a run that tell the focus, oldest first.

  Raises:
    McjaxError: there are none.
  """
  path = run / TELEMETRY if run.is_dir() else run
  try:
    lines = path.read_text("utf-8").splitlines()
  except OSError as error:
    raise McjaxError(f"{path}: {error.strerror}") from None
  try:
    found = [json.loads(line) for line in lines]
  except ValueError:
    raise McjaxError(f"{path} is no telemetry: not a JSON object a line") from (
      None)
  told = [r for r in found if isinstance(r, dict) and "spans" in r]
  if not told:
    raise McjaxError(f"{path} tells no focus: nothing was asked or refocused "
                     "while it was written")
  return told


def keep_texts(run: pathlib.Path, text: Text, cursor: int) -> None:
  """Keeps what the spans of a run's telemetry say, for a page made later."""
  try:
    found = records(run)
  except McjaxError:
    return  # nothing was asked
  (run / TEXTS).write_text(json.dumps(texts(found, text, cursor)), "utf-8")


def texts(found: Iterable[dict[str, Any]], text: Text, cursor: int
          ) -> dict[str, str]:
  """{"start-stop": text} of every span; of a long one, its beginning."""
  found = list(found)
  whole = {(a, b) for r in found for a, b in r.get("sources", ())} | {
    (r["start"], r["cursor"]) for r in found if r["kind"] == "generate"}
  out = {}
  for a, b in sorted({(a, b) for r in found for _, a, b in r["spans"]} | whole):
    stop = min(b, cursor)
    end = stop if (a, b) in whole else min(stop, a + _SHOWN)
    if a < end:
      out[f"{a}-{b}"] = text(a, end) + (" …" if end < stop else "")
  return out


def write(run: pathlib.Path, known: dict[str, str]) -> pathlib.Path:
  """Writes the page of a run beside its telemetry; returns its path."""
  folder = run if run.is_dir() else run.parent
  kept = ("kind", "step", "cursor", "start", "spans", "scores", "edits",
          "sources", "nodes_touched")
  content = {
    "name": folder.resolve().name, "texts": known,
    "records": [{k: r[k] for k in kept if k in r} for r in records(run)]}
  path = folder / PAGE
  path.write_text(page.fill(_TEMPLATE, f"Focus of {content['name']}", content),
                  "utf-8")
  return path


def kept_texts(run: pathlib.Path) -> dict[str, str]:
  """What `keep_texts` left; empty where it left nothing."""
  path = (run if run.is_dir() else run.parent) / TEXTS
  return json.loads(path.read_text("utf-8")) if path.exists() else {}
