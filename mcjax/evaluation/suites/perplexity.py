"""Losses on long documents: does a visible gist pay for its slot?

Two parts on held-out text. The frontier: windows of the same number of slots
that stand still before the scored tokens, filled with raw tokens alone, or with
gists of what lies before in a share of the slots, hidden or seen, as GistNet
writes them or fitted by gradient. The systems: all that have losses, at one
window, by position.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from mcjax.evaluation.report.intervals import of_difference, of_mean
from mcjax.evaluation.report.writer import (
  Chart,
  Report,
  Table,
  cell,
  make_folder,
  watched,
)
from mcjax.evaluation.suites.side_by_side import Column, add_table
from mcjax.evaluation.systems import make, static_window
from mcjax.evaluation.systems.models import Models, TextSettings
from mcjax.training.gist import recovery
from mcjax.types import BRANCHING, McjaxError


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
  """What is measured; `quick` makes it small. See `TextSettings` besides.

  Attributes:
    documents: a kind of text.
    scored: tokens of each.
    windows: of the frontier, in slots.
    gists: of a window's slots that gists take, in turn.
    fitted_windows: windows at which the most gists are fitted too, dozens of
      passes of the base; none if empty.
    steps: of the fit, and its rate below.
    systems: of the second part, by name; none if empty.
    reference: of these; the others are compared with it.
    window: slots or tokens of every system.
    history: tokens before the scored ones.
  """

  documents: int = 2
  scored: int = 128
  windows: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
  gists: tuple[int, ...] = (4, 16, 32)
  fitted_windows: tuple[int, ...] = (256, 512)
  steps: int = 24
  rate: float = 0.02
  systems: tuple[str, ...] = ("sink", "sliding", "megacontext",
                              "megacontext+gists", "bm25", "full", "none")
  reference: str = "sink"
  window: int = 1024
  history: int = 7680

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      documents=1, scored=32, windows=(256, 512), gists=(16,),
      fitted_windows=(256,), steps=2, systems=("sink", "megacontext", "none"),
      window=512, history=2048)
    return cls(**{**small, **changes})

  def __post_init__(self):
    if self.systems:
      make.check_all(self.systems, self.reference)
    if self.windows and min(self.windows) < 4 * BRANCHING:
      raise McjaxError(f"windows must be {4 * BRANCHING} or more")
    if self.windows and not all(
        0 < n < min(self.windows) - 2 * BRANCHING for n in self.gists):
      raise McjaxError(
        f"gists must leave {2 * BRANCHING} slots of every window, got "
        f"{', '.join(map(str, self.gists))}")
    if self.scored % 32:
      raise McjaxError("scored must be a multiple of 32")

  @property
  def length(self) -> int:
    """Tokens of one excerpt."""
    longest = [static_window.needed(w, max(self.gists)) for w in self.windows]
    return max([*longest, self.history]) + self.scored


def run(settings: Settings, folder) -> Report:
  """Measures and writes the report; what is in `folder` already is kept.

  Raises:
    McjaxError: no token store, no document that is long enough, or the models
      cannot be loaded.
  """
  models = settings.load()
  excerpts = recovery.pick_excerpts(
    settings.stores(models.lm), settings.length, settings.documents,
    settings.seed)
  report = measure(models, excerpts, settings, folder)
  report.write(folder)
  return report


def measure(models: Models, excerpts: recovery.Excerpts, s: Settings, folder
            ) -> Report:
  """Measures the excerpts; see `run`.

  Args:
    models: the base, its GistNet and LensNet.
    excerpts: of `s.length` tokens each.
    s: the settings.
    folder: keeps what is finished.
  """
  folder = make_folder(folder)
  report = Report("perplexity", dataclasses.asdict(s))
  kinds = list(excerpts.kinds)
  if s.windows:
    rows = [_frontier_cell(folder, models, s, ids, number)
            for number, ids in enumerate(excerpts.ids)]
    _report_frontier(report, s, rows, kinds)
  if s.systems:
    _report_systems(report, s, kinds, {
      name: _system_cell(folder, models, s, name, excerpts.ids)
      for name in s.systems
      if make.fits(models.lm, name, s.history + s.scored + 1)})
  report.add("documents", len(kinds), "documents")
  report.notes.append(
    f"{len(kinds)} documents of {', '.join(sorted(set(kinds)))}; brackets: 95 "
    "% bootstrap over documents, differences document by document. Below zero "
    "is better.")
  return report


def _key(s: Settings, ids: np.ndarray, **more) -> dict:
  key = dataclasses.asdict(s)
  for other in ("systems", "reference", "documents"):
    del key[other]
  return key | more | {"text": int(np.sum(ids.astype(np.int64)
                                          * np.arange(1, ids.size + 1)
                                          .reshape(ids.shape) % 1000003))}


# --- the frontier ------------------------------------------------------------


def _frontier_cell(folder: pathlib.Path, models: Models, s: Settings,
                   ids: np.ndarray, number: int) -> dict[str, list[float]]:
  """{"window/arm/gists": NLL of the scored tokens} of one document."""
  key = _key(s, ids, gistnet=models.encoder.fingerprint,
             lm=models.lm.fingerprint)
  return cell(folder, f"frontier-{number}", key,
              functools.partial(_frontier, models, s, ids))


def _frontier(models: Models, s: Settings, ids: np.ndarray) -> dict:
  lm, reader = models.lm, models.encoder.reader(models.lm)
  out = {}
  for window in s.windows:
    raw = static_window.cut(ids, window, 0, s.scored)
    out[f"{window}/raw/0"] = static_window.nll(lm, raw).tolist()
    for count in s.gists:
      parts = static_window.cut(ids, window, count, s.scored)
      gists = static_window.written(models.encoder, parts)
      arms = {"masked": None, "visible": gists}
      if count == max(s.gists):
        arms["shuffled"] = np.roll(gists, max(1, count // 2), axis=0)
      longest = len(parts.far) + len(parts.near) + len(parts.sink)
      if (window in s.fitted_windows and count == max(s.gists)
          and longest <= lm.config.max_positions):
        arms["fitted"] = static_window.fitted(
          lm, reader, parts, gists, s.steps, s.rate)
      for arm, given in arms.items():
        out[f"{window}/{arm}/{count}"] = static_window.nll(
          lm if given is None else reader, parts, given).tolist()
  return out


def _report_frontier(report: Report, s: Settings, rows: Sequence[dict],
                     kinds: list[str]) -> None:
  means = {key: [float(np.mean(row[key])) for row in rows] for key in rows[0]}
  table, pays = [], []
  for window in s.windows:
    raw = means[f"{window}/raw/0"]
    table.append([window, "raw only", window - static_window.SINK, 0,
                  _mean(report, f"frontier/{window}/raw", raw), None, None,
                  _forwarded(report, s, window, "raw", 0)])
    for count in s.gists:
      for arm in ("masked", "visible", "fitted", "shuffled"):
        mine = means.get(f"{window}/{arm}/{count}")
        if mine is None:
          continue
        name = f"frontier/{window}/{arm}/{count}"
        hidden = means[f"{window}/masked/{count}"]
        against = of_difference(mine, raw)
        if arm == "visible" and against is not None and against.high < 0:
          pays.append((window, count))
        table.append([
          window, f"raw + {arm} gists",
          window - static_window.SINK - count, count,
          _mean(report, name, mine),
          _difference(report, f"{name}/minus/raw", mine, raw),
          None if arm == "masked" else _difference(
            report, f"{name}/minus/masked", mine, hidden),
          _forwarded(report, s, window, arm, count)])
  report.tables.append(Table(
    f"The frontier: NLL of {s.scored} tokens behind windows of equal slots",
    ("slots", "window", "raw tokens", "gists", "NLL, nats a token",
     "− raw only", "− the same, gists hidden", "tokens forwarded"), table))
  report.add("frontier/windows at which a visible gist pays",
             ", ".join(f"{w} slots with {c}" for w, c in pays) or "none")
  _by_position(report, s, rows)
  report.notes.append(
    "raw only: the sink and the newest tokens. raw + gists: so many of the "
    "slots hold L1 gists of what lies before the raw tokens, which are fewer. "
    "hidden (masked): the gists take their slots and are not attended to. "
    f"fitted: {s.steps} steps of Adam so that the base reads the raw tokens as "
    "it does behind the text that the gists stand for. shuffled: the gists in "
    "another order, at the largest number alone. forwarded: tokens and gists "
    "that the base runs on for a document, a fit's passes back as well. A "
    "visible gist pays for its slot where − raw only lies below zero with "
    "its interval: "
    + (", ".join(f"{w} slots with {c} gists" for w, c in pays) or "nowhere")
    + ".")
  lines: dict[str, tuple[list, list]] = {}
  for window in s.windows:
    for key in means:
      size, arm, count = key.split("/")
      name = arm if not int(count) else f"{arm}, {count} gists"
      if int(size) == window and arm != "shuffled":
        xs, ys = lines.setdefault(name, ([], []))
        xs.append(window)
        ys.append(float(np.mean(means[key])))
  report.charts.append(Chart(
    "What a slot is worth", "slots of the window", "nats a token", lines,
    log_x=True))


def _forwarded(report: Report, s: Settings, window: int, arm: str, count: int
               ) -> int:
  """Adds the figure of what the base runs on for a document; see the note."""
  steps = s.steps if arm == "fitted" else 0
  found = static_window.forwarded(window, count, s.scored, steps)
  name = f"{arm}/{count}" if count else arm
  report.add(f"frontier/{window}/{name}/forwarded", found, "tokens")
  return found


def _edges(s: Settings) -> list[tuple[int, int]]:
  """Ranges of positions: each twice as long as the one before."""
  stops = [16]
  while stops[-1] * 2 < s.scored:
    stops.append(stops[-1] * 2)
  stops.append(s.scored)
  return list(zip([0, *stops[:-1]], stops))


def _by_position(report: Report, s: Settings, rows: Sequence[dict]) -> None:
  table = []
  for window in s.windows:
    for count in s.gists:
      cells = []
      for a, b in _edges(s):
        seen, hidden, raw = (
          [float(np.mean(row[key][a:b])) for row in rows]
          for key in (f"{window}/visible/{count}", f"{window}/masked/{count}",
                      f"{window}/raw/0"))
        name = f"frontier/{window}/visible/{count}/tokens {a}-{b}"
        cells += [_difference(report, f"{name}/minus/raw", seen, raw),
                  _difference(report, f"{name}/minus/masked", seen, hidden)]
      table.append([window, count, *cells])
  titles = [f"{a}–{b}: − {what}" for a, b in _edges(s)
            for what in ("raw only", "hidden")]
  report.tables.append(Table("Visible gists by position of the scored token",
                             ("slots", "gists", *titles), table))


def _mean(report: Report, name: str, values) -> str | None:
  return report.add_found(
    name, of_mean(values), "nats per token", 3, "documents")


def _difference(report: Report, name: str, values, others) -> str | None:
  return report.add_found(
    name, of_difference(values, others), "nats per token", 4)


# --- the systems -------------------------------------------------------------


def _system_cell(folder: pathlib.Path, models: Models, s: Settings, name: str,
                 ids: np.ndarray) -> list[dict]:
  maker = make.Maker(models, s.window, folder / "trees", seed=s.seed)
  slug = name.replace("/", "-")
  key = _key(s, ids, system=name, weights=maker.identity(name))
  return cell(folder, f"system-{slug}", key,
              functools.partial(_score_all, maker, s, name, ids))


def _score_all(maker: make.Maker, s: Settings, name: str, ids: np.ndarray
               ) -> list[dict]:
  asked, out = maker.make(name), []
  for document in watched(ids):
    asked.ingest(document[-s.history - s.scored : -s.scored])
    before = asked.forwarded
    try:
      found = asked.nll(document[-s.scored :])[1:]
      out.append({"nll": float(np.mean(found)),
                  "forwarded": asked.forwarded - before, **{
                    f"{a}-{b}": float(np.mean(found[max(0, a - 1) : b - 1]))
                    for a, b in _edges(s)}})
    finally:
      asked.close()
  return out


def _report_systems(report: Report, s: Settings, kinds: list[str], found
                    ) -> None:
  columns = [Column("nll", "NLL, nats a token", "nats per token", True, 3)]
  columns += [Column(f"{a}-{b}", f"tokens {a}–{b}", "nats per token", digits=2)
              for a, b in _edges(s)]
  columns.append(Column("forwarded", "tokens forwarded", "tokens", digits=0))
  add_table(report, f"Systems, W={s.window}, behind {s.history:,} tokens",
            "systems", columns, found, s.reference)
  report.notes.append(
    "Systems: the first scored token is left out, which some cannot predict."
    + (" BM25 searches every 64 tokens for the newest 64; half of its window "
       "are the newest tokens." if "bm25" in s.systems else ""))
