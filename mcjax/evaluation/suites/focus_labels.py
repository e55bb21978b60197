"""Labels: do a policy's scores rank edits as their true effect ranks them?

A window follows held-out text, led by the first policy. At marked steps some
of the legal edits are tried, and their gain (NLL of the next tokens without
the edit minus with it) is compared with what every policy asks of the very
same window. Regret: what at most `max_edits` of the tried edits could have
gained within the budget, minus what those gain that the allocator chooses from
the policy's scores.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

from mcjax.config import Config
from mcjax.evaluation.report.writer import Report, Table
from mcjax.evaluation.suites.focus_bench import (
  Bench,
  add_forwarded,
  add_interval,
  add_mean,
  digest,
  identity,
)
from mcjax.focus import allocator as focus_allocator
from mcjax.focus.policy import Policy
from mcjax.runtime.focus_loop import FocusLoop
from mcjax.training.common.ranks import spearman
from mcjax.training.gist import recovery
from mcjax.types import BRANCHING
from mcjax.window.counterfactual import Candidate, edit_losses
from mcjax.window.working_context import COLLAPSE, EXPAND

_COST = BRANCHING - 1


def measure(bench: Bench, report: Report) -> None:
  """Measures every document and adds a table and figures."""
  s = bench.settings
  names = list(dict.fromkeys([*s.policies, "recency"]))
  weights = {n: identity(bench.policy(n)) for n in names}
  follow = s.windows * s.spacing * BRANCHING
  excerpts = recovery.pick_excerpts(
    bench.stores, s.document_history + follow + s.horizon, s.documents, s.seed
  )
  documents = []
  for number, ids in enumerate(excerpts.ids):
    key = {"policies": weights, "text": digest(ids.tobytes()),
           "history": s.document_history, "windows": s.windows,
           "spacing": s.spacing, "candidates": s.candidates,
           "horizon": s.horizon}
    documents.append(bench.kept(
      f"labels-{number}", key,
      lambda ids=ids: _document(bench, bench.timeline(ids), names),
    ))
  add_forwarded(report, "labels", documents)
  _report(bench, report, [d["windows"] for d in documents], names)


def _document(bench: Bench, ids: np.ndarray, names: list[str]) -> dict:
  """Labels and wishes in the windows of one document."""
  s = bench.settings
  config = bench.config("recency")
  measured = {n: bench.policy(n) for n in names}
  rng = np.random.default_rng([s.seed, int(ids[-1])])
  at = s.document_history
  out = []
  with bench.opened(bench.tree(ids[:at]), bench.policy(s.policies[0])) as mc:
    loop = mc._loop
    loop.warm_up()
    loop.cold_start()
    loop.sync()
    for step in range(s.windows * s.spacing):
      loop.append(ids[at : at + BRANCHING], continuation=ids[at:])
      at += BRANCHING
      loop.sync(renew=BRANCHING + 1)
      loop.follow()
      ahead = ids[at : at + s.horizon]
      if (step + 1) % s.spacing == 0:
        out.append(_window(loop, config, measured, ahead, s.candidates, rng))
      loop.refocus(need=BRANCHING, continuation=ids[at:])
    forwarded = loop.context.tokens_run
  return {"windows": out, "forwarded": forwarded}


def _window(loop: FocusLoop, config: Config, measured: dict[str, Policy],
            ahead: np.ndarray, count: int, rng) -> dict:
  """Gains of sampled edits, and what each policy asks of the same window."""
  window = loop.context.window
  legal = focus_allocator.legal_edits(
    window, step=loop.step, cooldown=config.cooldown, sink=config.sink_tokens,
    protect=config.protect_tokens,
  )
  half = count // 2
  candidates = [
    Candidate(action, int(at))
    for action, mask in ((EXPAND, legal.expand), (COLLAPSE, legal.collapse))
    for at in np.sort(rng.permutation(np.flatnonzero(mask))[:half])
  ]
  base, losses = edit_losses(
    loop.context, loop.tree, candidates, ahead, pad_to=half
  )
  gains = base - losses
  room = (window.free, BRANCHING, config.max_edits)
  size = len(legal.expand)
  view = loop.view(continuation=ahead)
  wishes, gained = {}, {}
  for name, policy in measured.items():
    scores = np.asarray(policy.score(view), np.float64)
    wishes[name] = [wish(scores, c) for c in candidates]
    gained[name] = _chosen_gain(
      scores, candidates, gains, size, config.threshold, room)
  return {
    "action": [int(c.action) for c in candidates],
    "finest": [int(window.entries.level[c.entry]) - (c.action == EXPAND)
               for c in candidates],
    "gain": gains.tolist(), "wish": wishes, "gained": gained,
    "best": best_gain(candidates, gains, *room), "base": base,
    "free": window.free,
  }


def wish(scores: np.ndarray, candidate: Candidate) -> float:
  """How much scores [E] ask for an edit: for a collapse, the negated mean."""
  at = candidate.entry
  if candidate.action == EXPAND:
    return float(scores[at])
  return -float(scores[at : at + BRANCHING].mean())


def _chosen_gain(scores, candidates, gains, size: int, threshold: float, room
                 ) -> float:
  """Gain of what the allocator chooses among the candidates.

  Args:
    scores: [E] of the entries.
    candidates, gains: edits and what each gains.
    size: entries that the window can hold, those of the block in flight too.
    threshold: of a wish.
    room: free slots, slots that must be free, edits at most.
  """
  free, need, max_edits = room
  masks = np.zeros((2, size), bool)
  for c in candidates:
    masks[0 if c.action == EXPAND else 1, c.entry] = True
  plan = focus_allocator.plan_edits(
    scores.astype(np.float32), focus_allocator.Legal(*masks), free=free,
    need=need, threshold=threshold, max_edits=max_edits,
  )
  gain = {(c.action, c.entry): g for c, g in zip(candidates, gains)}
  return float(sum(
    gain[action, at]
    for action, at in zip(plan.action.tolist(), plan.entry.tolist()) if action
  ))


def best_gain(candidates: list[Candidate], gains: np.ndarray, free: int,
              need: int, max_edits: int) -> float:
  """The largest sum of gains of at most `max_edits` edits within the budget.

  As for the allocator, `need` slots must be free afterwards, or as many as the
  collapses can free. Exact: collapses are enumerated, expands then chosen by
  gain; an expand inside a collapsed group is barred.
  """
  expands = sorted(
    ((g, c.entry) for c, g in zip(candidates, gains)
     if c.action == EXPAND and g > 0), reverse=True,
  )
  collapses = [(g, c.entry) for c, g in zip(candidates, gains)
               if c.action == COLLAPSE]
  most = min(max_edits, len(collapses))
  need = min(need, free + _COST * most)
  best = -np.inf
  for count in range(most + 1):
    slots = free + _COST * count
    if slots < need:
      continue
    affordable = min(max_edits - count, (slots - need) // _COST)
    for group in itertools.combinations(collapses, count):
      allowed = (
        g for g, at in expands
        if not any(a <= at < a + BRANCHING for _, a in group)
      )
      total = sum(g for g, _ in group) + sum(
        itertools.islice(allowed, affordable)
      )
      best = max(best, total)
  return float(best)


def _pooled(documents, name: str, keep, rows) -> float:
  """Rank correlation over all candidates of the windows of documents."""
  wishes, gains = [], []
  for row in rows:
    for window in documents[row]:
      chosen = keep(window)
      wishes.append(np.asarray(window["wish"][name])[chosen])
      gains.append(np.asarray(window["gain"])[chosen])
  return spearman(np.concatenate(wishes), np.concatenate(gains))


_KEEP = {
  "": lambda w: slice(None),
  "/of L0 only": lambda w: np.asarray(w["finest"]) == 0,
  "/of expands": lambda w: np.asarray(w["action"]) == EXPAND,
  "/of collapses": lambda w: np.asarray(w["action"]) == COLLAPSE,
}


def _report(bench: Bench, report: Report, documents, names: list[str]) -> None:
  s = bench.settings
  count = len(documents)
  regret = {n: np.array([
    np.mean([w["best"] - w["gained"][n] for w in d]) for d in documents
  ]) for n in names}
  rows = []
  for name in names:
    row = [name]
    for suffix, keep in _KEEP.items():
      row.append(add_interval(
        report, f"labels/{name}/rank correlation{suffix}",
        functools.partial(_pooled, documents, name, keep), count, "1", 2,
      ))
    row.append(add_mean(
      report, f"labels/{name}/rank correlation per window",
      [np.mean([spearman(w["wish"][name], w["gain"]) for w in d])
       for d in documents], "1", 2,
    ))
    row.append(add_mean(
      report, f"labels/{name}/regret", regret[name], "nats per token", 4
    ))
    row.append(add_interval(
      report, f"labels/{name}/regret relative to recency",
      lambda r, name=name: float(
        regret[name][r].mean() / max(regret["recency"][r].mean(), 1e-12)
      ), count, "1", 2,
    ))
    rows.append(row)
  windows = [w for d in documents for w in d]
  report.add("labels/candidates", sum(len(w["gain"]) for w in windows), "edits")
  report.add("labels/windows", len(windows), "windows")
  report.add("labels/best gain",
             float(np.mean([w["best"] for w in windows])), "nats per token")
  report.tables.append(Table(
    f"Scores against the true effect of an edit, H={s.horizon}, {count} "
    f"documents, {len(windows)} windows",
    ("policy", "rank correlation, pooled", "of edits that show or hide L0",
     "among expands", "among collapses", "mean per window",
     "regret, nats a token", "÷ recency's"), rows,
  ))
  report.notes.append(
    "labels: gain of an edit = NLL of the next tokens as the window is − after "
    "the edit; a policy's wish = its score for an expand, minus the mean score "
    "of the 32 siblings for a collapse. The pooled correlation also tells "
    "whether a policy rightly prefers expands to collapses; recency, which "
    "never asks for an expand, must lose there. Regret: gain of the best "
    "affordable edits in hindsight among those tried − gain of those the "
    "allocator chooses from the scores. Where gists are masked, edits among "
    "gists gain nothing. The oracle knows the next 32 tokens and tries its own "
    "candidates only. The figure “tokens forwarded”: tokens that the base ran "
    "on for a document, all edits tried. Brackets: 95 % bootstrap over "
    "documents."
  )
