"""Topic shift and return: does the focus follow what the text is about?

Far back in a history lies a stretch of document B. Then comes document A, then
B's continuation (the shift), then A's continuation (the return). Per refocus
step it is counted which document the raw tokens belong to, the newest ones
apart, which are at L0 whatever the policy does.
"""

from __future__ import annotations

import numpy as np

from mcjax.evaluation.report.writer import Chart, Report, Table
from mcjax.evaluation.suites.focus_bench import (
  Bench,
  add_forwarded,
  add_mean,
  digest,
  history_of,
  identity,
)
from mcjax.evaluation.systems.known_places import KnownPlaces
from mcjax.focus.policy import Policy
from mcjax.runtime.focus_loop import FocusLoop
from mcjax.training.gist import recovery
from mcjax.types import BRANCHING, McjaxError

WITHIN = 4  # refocus steps after which a shift is judged
RECENT = WITHIN * BRANCHING  # newest tokens that are not counted
_STEADY = 16  # steps over which the swap rate is taken
_SHOWN = 16  # steps drawn


class Passage:
  """A shift: its timeline, and where in it the documents lie.

  Attributes:
    timeline: [n] int32.
    start: first token that is followed step by step.
    first: spans of A: before the shift, and after the return.
    second: spans of B: far back, and from the shift on.
  """

  def __init__(self, filler: np.ndarray, a: np.ndarray, b: np.ndarray,
               topic: int):
    """Lays out filler, B, filler, then A, B, A; `topic` tokens of A first."""
    half = topic // 2
    third = len(filler) // 3
    self.timeline = np.concatenate([
      filler[:third], b[:topic], filler[third:], a[:topic],
      b[topic : topic + half], a[topic : topic + half],
    ]).astype(np.int32)
    self.start = len(filler) + topic
    self.shift = self.start + topic
    self.back = self.shift + half
    self.first = ((self.start, self.shift), (self.back, len(self.timeline)))
    self.second = ((third, third + topic), (self.shift, self.back))


def measure(bench: Bench, report: Report) -> None:
  """Follows every passage with every policy; adds a table and plots."""
  s = bench.settings
  series: dict[str, list[dict]] = {n: [] for n in s.policies}
  for number, passage in enumerate(_passages(bench)):
    for name in s.policies:
      policy = KnownPlaces() if name == "oracle" else bench.policy(name)
      key = {"text": digest(passage.timeline.tobytes()), "topic": s.topic,
             "policy": name, "weights": identity(policy)}
      series[name].append(bench.kept(
        f"shift-{number}-{name}", key,
        lambda passage=passage, policy=policy: _follow(bench, passage, policy),
      ))
  _report(bench, report, series)


def _passages(bench: Bench) -> list[Passage]:
  s = bench.settings
  topic = s.topic // (2 * BRANCHING) * 2 * BRANCHING
  kinds = len(bench.stores)
  per_kind = -(-2 * s.shifts // kinds)
  excerpts = recovery.pick_excerpts(
    bench.stores, topic + topic // 2, per_kind, s.seed
  )
  # Neighbours in this order are of different kinds where there are several.
  order = sorted(range(len(excerpts.ids)), key=lambda i: (
    excerpts.kinds[:i].count(excerpts.kinds[i]), excerpts.kinds[i]))
  if len(order) < 2:
    raise McjaxError(
      f"a shift needs two documents of {topic + topic // 2} tokens"
    )
  length = max(BRANCHING, s.shift_history - topic) // BRANCHING * BRANCHING
  out = []
  for number in range(min(s.shifts, len(order) // 2)):
    a, b = (excerpts.ids[order[2 * number + k]] for k in range(2))
    filler = history_of(bench.stores, length - bench.first, 1000 + number,
                        s.seed)
    out.append(Passage(bench.timeline(filler), a, b, topic))
  return out


def _follow(bench: Bench, passage: Passage, policy: Policy) -> dict:
  """Counts after every refocus step; see `_counts`."""
  url = bench.tree(passage.timeline[: passage.start])
  steps = []
  with bench.opened(url, policy) as mc:
    loop = mc._loop
    loop.warm_up()
    loop.cold_start()
    for at in range(passage.start, len(passage.timeline), BRANCHING):
      if isinstance(policy, KnownPlaces):
        in_second = passage.shift <= at < passage.back
        policy.places = passage.second if in_second else passage.first
      edits = mc.telemetry.counters["edits"]
      loop.append(passage.timeline[at : at + BRANCHING])
      loop.follow()
      loop.refocus_deeper()
      steps.append({
        **_counts(loop, passage, mc.config.sink_tokens),
        "edits": mc.telemetry.counters["edits"] - edits,
      })
    forwarded = loop.context.tokens_run
  return {
    "forwarded": forwarded,
    "steps": steps, "shift": (passage.shift - passage.start) // BRANCHING,
    "back": (passage.back - passage.start) // BRANCHING,
  }


def _counts(loop: FocusLoop, passage: Passage, sink: int) -> dict[str, int]:
  """Raw tokens by document.

  Returns:
    raw: all but the sink and the newest `RECENT`; first, second: those of A
    and B among them; old first, old second: of A before the shift and of B far
    back, the newest included.
  """
  e = loop.context.window.entries
  raw = e.start()[e.level == 0]
  older = raw[(raw >= sink) & (raw < loop.tree.cursor - RECENT)]

  def inside(tokens, *spans) -> int:
    return int(sum(np.sum((tokens >= a) & (tokens < b)) for a, b in spans))

  return {
    "raw": len(older), "first": inside(older, *passage.first),
    "second": inside(older, *passage.second),
    "old first": inside(raw, passage.first[0]),
    "old second": inside(raw, passage.second[0]),
  }


def share(step: dict, topic: str) -> float:
  """Share of the older raw tokens that belong to a topic; 0 without any."""
  return step[topic] / step["raw"] if step["raw"] else 0.0


def summary(cell: dict) -> dict[str, float]:
  """What one passage shows: shares of the topic at hand, tokens moved."""
  steps, shift, back = cell["steps"], cell["shift"], cell["back"]
  before, left = steps[shift - 1], steps[back - 1]
  moved = steps[shift + WITHIN - 1]
  home = steps[back + WITHIN - 1]
  steady = steps[max(0, shift - _STEADY) : shift]
  return {
    "before the shift": share(before, "first"),
    "of the new topic before the shift": share(before, "second"),
    "4 steps after the shift": share(moved, "second"),
    "just before the return": share(left, "first"),
    "4 steps after the return": share(home, "first"),
    "of A collapsed after the shift":
      float(before["old first"] - moved["old first"]),
    "of B brought back after the shift":
      float(moved["old second"] - before["old second"]),
    "of A brought back after the return":
      float(home["old first"] - left["old first"]),
    "edits per refocus in steady text":
      float(np.mean([x["edits"] for x in steady])),
  }


def _report(bench: Bench, report: Report, series) -> None:
  rows, columns = [], []
  for name, cells in series.items():
    found = [summary(cell) for cell in cells]
    columns = list(found[0])
    row = [name]
    for column in columns:
      unit = ("edits" if "edits" in column else
              "tokens" if column.startswith("of ") and "topic" not in column
              else "share")
      row.append(add_mean(
        report, f"shift/{name}/{column}", [f[column] for f in found], unit,
        0 if unit == "tokens" else 2,
      ))
    rows.append([*row, add_forwarded(report, f"shift/{name}", cells)])
  report.tables.append(Table(
    f"Topic shift and return, {len(next(iter(series.values())))} pairs of "
    "documents",
    ("policy", *(c if c.startswith("edits") else f"tokens {c}"
                 if "topic" not in c and c.startswith("of ")
                 else f"share {c}" for c in columns), "tokens forwarded"), rows,
  ))
  report.notes.append(
    "shift: share = raw tokens of the topic at hand among all raw tokens, the "
    f"sink and the newest {RECENT} apart, which are raw in any case; tokens = "
    f"change of A's and B's earlier raw tokens within {WITHIN} refocus steps. "
    "The oracle is told the topic. Forwarded: tokens that the base ran on. "
    "Brackets: 95 % bootstrap over pairs."
  )
  for start, topic, title in (
    ("shift", "second", "After the topic shift"),
    ("back", "first", "After the return"),
  ):
    lines = {}
    for name, cells in series.items():
      last = min(_SHOWN, *(len(c["steps"]) - c[start] for c in cells))
      xs = list(range(-WITHIN, last + 1))
      lines[name] = (xs, [float(np.mean([
        share(c["steps"][c[start] + x - 1], topic) for c in cells
      ])) for x in xs])
    report.charts.append(Chart(
      title, "refocus steps", "share of older raw tokens on the topic",
      lines))
