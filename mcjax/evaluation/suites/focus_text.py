"""Natural text at an equal budget: the loop against a sliding window.

Both have the same slots and score the same tokens of held-out documents, a
block at a time; the sliding window holds the sink and the newest tokens, the
loop what its policy focuses on. The first `lead` tokens fill the loop's window
and are not counted in either.
"""

from __future__ import annotations

import numpy as np

from mcjax.evaluation.report.writer import Report, Table
from mcjax.evaluation.suites.focus_bench import (
  Bench,
  add_forwarded,
  add_mean,
  digest,
  identity,
)
from mcjax.evaluation.systems.baselines import sliding_window_nll
from mcjax.focus.policy import Policy
from mcjax.training.gist import recovery

_SLIDING = "sliding window"


def measure(bench: Bench, report: Report) -> None:
  """Scores every document with every arm and adds a table and figures."""
  s = bench.settings
  excerpts = recovery.pick_excerpts(
    bench.stores, s.document_history + s.lead + s.scored, s.documents, s.seed
  )
  found: dict[str, list[dict]] = {}
  for number, ids in enumerate(excerpts.ids):
    timeline = bench.timeline(ids)[: s.document_history + s.lead + s.scored]
    key = {"text": digest(timeline.tobytes()), "history": s.document_history,
           "lead": s.lead}
    for name in (_SLIDING, *s.policies):
      policy = None if name == _SLIDING else bench.policy(name)
      found.setdefault(name, []).append(bench.kept(
        f"text-{number}-{name.replace(' ', '-')}",
        {**key, "policy": name, "weights": identity(policy)},
        lambda policy=policy, timeline=timeline: _score(
          bench, timeline, policy
        ),
      ))
  _report(bench, report, found, len(excerpts.kinds))


def _score(bench: Bench, timeline: np.ndarray, policy: Policy | None) -> dict:
  """Mean NLL of the scored tokens; without a policy, of a sliding window."""
  s = bench.settings
  if policy is None:
    nll, forwarded = sliding_window_nll(
      bench.lm, bench.config("recency"), timeline, s.document_history
    )
    used = 1.0
  else:
    url = bench.tree(timeline[: s.document_history])
    with bench.opened(url, policy) as mc:
      loop = mc._loop
      loop.warm_up()
      loop.cold_start()
      before = loop.context.tokens_run
      nll = loop.score(timeline[s.document_history :])
      forwarded = loop.context.tokens_run - before
      steps = [r["utilisation"] for r in mc.telemetry.records
               if r["kind"] == "refocus"]
      used = float(np.mean(steps[len(steps) // 2 :]))
  counted = nll[s.lead :]
  return {"nll": float(counted.mean()), "tokens": len(counted), "used": used,
          "forwarded": forwarded}


def _report(bench: Bench, report: Report, found, count: int) -> None:
  s = bench.settings
  rows = []
  losses = {n: np.array([c["nll"] for c in cells])
            for n, cells in found.items()}
  for name, cells in found.items():
    if {c["tokens"] for c in cells} != {s.scored}:
      raise ValueError(f"{name} scored other tokens than asked")
    used = float(np.mean([c["used"] for c in cells]))
    report.add(f"text/{name}/nll", float(losses[name].mean()),
               "nats per token")
    report.add(f"text/{name}/window in use", used, "share")
    difference = None
    if name != _SLIDING:
      difference = add_mean(
        report, f"text/{name}/minus sliding window",
        losses[name] - losses[_SLIDING], "nats per token", 4,
      )
    cost = add_forwarded(report, f"text/{name}", cells)
    rows.append([name, float(losses[name].mean()), difference, used, cost])
  report.tables.append(Table(
    f"Natural text, {count} documents, {s.scored} tokens each behind "
    f"{s.document_history + s.lead:,}, window {s.window} for every arm",
    ("arm", "NLL, nats a token", "minus sliding window", "window in use",
     "tokens forwarded"), rows,
  ))
  report.notes.append(
    "text: below zero, the loop predicts better than the newest tokens and the "
    "sink in as many slots. forwarded: tokens that the base ran on for a "
    "document. Brackets: 95 % bootstrap over documents of the "
    "paired difference."
  )
