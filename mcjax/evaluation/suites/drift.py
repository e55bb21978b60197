"""What splicing costs in quality: NLL of splice minus exact, step after step.

A window follows real text, teacher-forced, with a refocus every 32 tokens. At
marked steps the next tokens are scored twice behind the very same focus: with
the spliced cache as it is, and after an exact rebuild of the cache. Nothing
else differs, so the difference is what many splices have done. The run is
repeated with a periodic rebuild (`Config.refresh_every`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from mcjax.config import Config
from mcjax.evaluation.data import texts
from mcjax.evaluation.report import writer as report
from mcjax.evaluation.report.intervals import of_mean
from mcjax.evaluation.report.writer import Report, Table, progress
from mcjax.evaluation.systems.loop_arm import make_loop, make_tree
from mcjax.evaluation.systems.models import Models, ModelSettings
from mcjax.runtime.focus_loop import FocusLoop
from mcjax.types import BRANCHING


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
  """Sizes.

  Attributes:
    window: W.
    policy: of the loop; any but oracle.
    history: tokens in the tree before the first step.
    steps: refocus steps at which drift is measured.
    probes: measurements per mark, spread over the steps up to it from half of
      it on; fewer where there are fewer steps.
    horizon: tokens scored, a multiple of 32.
    refresh: values of `Config.refresh_every`; 0 is never.
    renew: `Config.renew_tokens`.
    gist_attention: as in `Config`.
    text: files; the standard library if empty.
  """

  window: int = 1024
  policy: str = "auto"
  history: int = 32768
  steps: tuple[int, ...] = (16, 64, 256, 1024)
  probes: int = 64
  horizon: int = 64
  renew: int = Config().renew_tokens
  refresh: tuple[int, ...] = (0, 64, 256)
  gist_attention: str = "auto"
  text: tuple[str, ...] = ()

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      window=512, history=4096, steps=(4, 8), probes=2,
      refresh=(0, 4))
    return cls(**{**small, **changes})


def run(settings: Settings, folder) -> Report:
  """Measures every refresh setting; what is in `folder` already is kept."""
  folder = report.make_folder(folder)
  models = settings.load()
  cells = {
    every: report.cell(
      folder, f"refresh-{every}",
      {**dataclasses.asdict(settings), "refresh": every, "by": "position"},
      functools.partial(_measure, settings, models, folder, every),
    )
    for every in settings.refresh
  }
  out = Report("drift", dataclasses.asdict(settings))
  rows = []
  for every, saved in cells.items():
    label = f"every {every} steps" if every else "never"
    for mark in settings.steps:
      values = saved["drift"][str(mark)]
      mean, spread = float(np.mean(values)), _standard_error(values)
      rows.append([label, mark, len(values), mean, spread,
                   float(np.mean(np.abs(values))),
                   float(np.mean(saved["exact"][str(mark)]))])
      out.add(f"refresh {label}: drift after {mark} steps", mean, "nats")
    out.add(f"refresh {label}: edits per refocus", saved["edits"], "edits")
    out.add(f"refresh {label}: expands per refocus", saved["expands"],
            "expands")
    if "forwarded" in saved:
      out.add(f"refresh {label}: tokens forwarded", saved["forwarded"],
              "tokens")
  out.tables.append(Table(
    f"NLL of splice minus exact, {settings.horizon} tokens, "
    f"W={settings.window}",
    ("refresh", "after steps", "probes", "drift, nats", "± s.e.",
     "mean size", "exact NLL"), rows,
  ))
  _profile(out, settings, cells)
  out.notes.append(
    "The figures “tokens forwarded” count all that the base ran on, exact "
    "rebuilds too.")
  out.notes.append(
    f"Edits per refocus: {cells[settings.refresh[0]]['edits']:.2f}; gists "
    f"are {'visible' if cells[settings.refresh[0]]['visible'] else 'masked'}."
  )
  out.charts.append(_chart(settings, cells))
  out.write(folder)
  return out


def _profile(out: Report, settings: Settings, cells) -> None:
  """Splice minus exact by how far behind the refocus a token is."""
  stops = [n for n in (1, 4, 16, 32, 64, 128) if n < settings.horizon]
  edges = list(zip([0, *stops], [*stops, settings.horizon]))
  rows = []
  for every, saved in cells.items():
    label = f"every {every} steps" if every else "never"
    values = np.array(saved["profile"])
    columns = []
    for a, b in edges:
      columns.append(out.add_found(
        f"refresh {label}: drift of tokens {a}-{b}",
        of_mean(values[:, a:b].mean(axis=1)), "nats", 4))
    rows.append([label, len(values), *columns])
  out.tables.append(Table(
    "Splice minus exact by tokens since the refocus, nats (95 % bootstrap over "
    "probes)", ("refresh", "probes", *(f"{a}–{b}" for a, b in edges)), rows))


def _measure(settings: Settings, models: Models, folder, every: int) -> dict:
  config = Config(
    window=settings.window, refresh_every=every,
    renew_tokens=settings.renew, policy=settings.policy,
    gist_attention=settings.gist_attention,
  )
  tree = make_tree(models, folder, settings.history, settings.text)
  loop = make_loop(models, tree, config)
  last = max(settings.steps)
  count = (last + 2) * BRANCHING + settings.horizon
  ids = texts.tokens(
    models.lm.tokenizer, count, settings.text, settings.history)
  loop.warm_up()
  loop.cold_start()
  loop.sync()
  marks = {
    step: mark for mark in settings.steps
    for step in _probed(mark, settings.probes)
  }
  drift = {str(m): [] for m in settings.steps}
  profile = []
  exact = {str(m): [] for m in settings.steps}
  for step in range(1, last + 1):
    a = (step - 1) * BRANCHING
    loop.append(ids[a : a + BRANCHING])
    loop.sync(renew=BRANCHING + 1)
    loop.follow()
    loop.refocus(need=BRANCHING + settings.horizon)
    if step in marks:
      start = a + BRANCHING
      ahead = ids[start : start + settings.horizon]
      pair = [_ahead_nll(loop, ahead, rebuild) for rebuild in (False, True)]
      drift[str(marks[step])].append(float(np.mean(pair[0] - pair[1])))
      exact[str(marks[step])].append(float(np.mean(pair[1])))
      profile.append((pair[0] - pair[1]).tolist())
    if step % 64 == 0:
      progress(f"drift, refresh {every}: step {step} of {last}")
  counters = loop.telemetry.counters
  steps = max(1, counters["refocus_steps"])
  tree.close()
  return {"drift": drift, "exact": exact, "profile": profile,
          "visible": loop.context.show_gists,
          "forwarded": loop.context.tokens_run,
          "edits": counters["edits"] / steps,
          "expands": counters["expands"] / steps}


def _probed(mark: int, probes: int) -> list[int]:
  """Steps at which the drift "after `mark` steps" is measured."""
  half = mark // 2
  count = min(probes, mark - half)
  return [half + int((k + 0.5) * (mark - half) / count) + 1
          for k in range(count)]


def _ahead_nll(loop: FocusLoop, ids: np.ndarray, rebuild: bool) -> np.ndarray:
  """NLL [n] of the tokens ahead behind the focus as it is; undone after."""
  context = loop.context
  with loop.undone():
    if rebuild:
      context.forget()
    loop.sync()
    out = []
    for a in range(0, len(ids), BRANCHING):
      chunk = ids[a : a + BRANCHING]
      loop.append(chunk)
      loop.sync(renew=len(chunk) + 1)
      out.append(context.newest_nll(chunk))
    return np.concatenate(out)


def _standard_error(values) -> float:
  return float(np.std(values) / np.sqrt(max(1, len(values) - 1)))


def _chart(settings: Settings, cells) -> report.Chart:
  xs = list(settings.steps)
  return report.Chart(
    "Drift of the cache", "refocus steps", "splice − exact, nats a token",
    {f"refresh {every or 'never'}":
     (xs, [float(np.mean(c["drift"][str(m)])) for m in xs])
     for every, c in cells.items()}, log_x=True)
