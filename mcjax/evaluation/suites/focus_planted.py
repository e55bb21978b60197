"""Planted facts: is what a question asks about in detail when it is answered?

Made-up facts lie far apart in held-out documents; every question is asked from
the same window and not remembered, or all of them in one conversation. See
`mcjax.evaluation.suites.focus` for what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
import uuid

import numpy as np

from mcjax.evaluation.data import planted, reworded
from mcjax.evaluation.report.intervals import of_difference, of_mean
from mcjax.evaluation.report.writer import Chart, Report, Table
from mcjax.evaluation.suites.focus_bench import (
  Bench,
  digest,
  history_of,
  identity,
)
from mcjax.evaluation.systems.known_places import KnownPlaces
from mcjax.runtime.megacontext import MegaContext
from mcjax.types import Entry

CHUNK = 64  # tokens of a retriever's chunk
KEY_FLOPS = 128  # per node: a dot product with a key of 64 dimensions
_COLUMNS = ("policy", "hit@budget", "answered", "of those answered in front",
            "nodes / step", "bytes read / step", "edits / step",
            "search ÷ decode step, FLOPs", "tokens forwarded")

_PAIRED = _COLUMNS[1:3]  # compared with the first policy, fact by fact

Retriever = Callable[[list[str], list[str]], np.ndarray]


class Story(NamedTuple):
  """One history: its tokens, what was planted, and where."""

  name: str
  timeline: np.ndarray
  needs: list[planted.Need]
  places: list[tuple[int, int]]


def covered(place: tuple[int, int], focus: Sequence[Entry]) -> bool:
  """Whether all tokens of [start, stop) are at L0 in a tiling."""
  start, stop = place
  raw = {e.start for e in focus if e.level == 0 and start <= e.start < stop}
  return bool(len(raw) == stop - start)


def measure(bench: Bench, report: Report,
            retriever: Retriever | None = None) -> None:
  """Measures both lengths of history and adds tables and figures."""
  s = bench.settings
  found = {s.history: [
    _story(bench, s.history, s.needs, n, retriever) for n in range(s.histories)
  ]}
  if s.long_history:
    found[s.long_history] = [
      _story(bench, s.long_history, s.long_needs, s.histories, retriever)
    ]
  summaries = {
    length: _table(bench, report, length, cells)
    for length, cells in found.items()
  }
  if s.long_history:
    _growth(bench, report, summaries)
  if s.reworded:
    report.notes.append("planted: everyday facts, asked for in other words.")
  if s.in_a_row:
    report.notes.append("planted: the questions of a history are one "
                        "conversation, every exchange in the window after it"
                        f"; of {s.rounds} rounds the last counts.")
  report.notes.append(
    "planted: hit@budget is the share of facts with every token at L0 when the "
    "answer begins; of those answered in front: among the questions that the "
    "base answers with nothing but the fact before them. "
    f"The retriever gets as many raw tokens as {s.policies[0]} has in its "
    f"window, the sink apart, in chunks of {CHUNK}. The oracle is told where "
    "the fact is. Search cost: nodes per step times FLOPs per node "
    f"({KEY_FLOPS} unless the policy says), over the FLOPs of one decoded "
    "token; a step comes every 32 tokens. forwarded: tokens that the base ran "
    "on for a question."
  )


def _story(bench: Bench, length: int, count: int, number: int,
           retriever: Retriever | None) -> dict[str, dict]:
  """Outcomes of one history by arm: the policies, retriever and in front."""
  s = bench.settings
  if s.reworded:
    needs = reworded.draw(count, number, s.seed, s.split)
  else:
    needs = planted.draw(count, s.seed * 1000 + number)
  facts = [bench.lm.tokenizer.encode(f" {n.fact}") for n in needs]
  ids, places = planted.plant(
    history_of(bench.stores, length, number, s.seed), facts, number
  )
  places = [(a + bench.first, b + bench.first) for a, b in places]
  name = "reworded" if s.reworded else "planted"
  story = Story(f"{name}-{length}-{number}", bench.timeline(ids), needs,
                places)
  key = {"history": length, "number": number, "needs": count,
         "told": digest(*map(repr, needs)),
         "answers": s.answers and s.answer_tokens, "in a row": s.in_a_row,
         **({"reworded": True} if s.reworded else {}),
         **({"rounds": s.rounds} if s.rounds > 1 else {})}
  out = {}
  for name in s.policies:
    policy = KnownPlaces() if name == "oracle" else bench.policy(name)
    out[name] = bench.kept(
      f"{story.name}-{name}",
      {**key, "policy": name, "weights": identity(policy)},
      lambda policy=policy: _ask_all(bench, story, policy),
    )
  if retriever is not None:
    budgets = out[s.policies[0]]["raw"]
    out["retriever"] = bench.kept(
      f"{story.name}-retriever", {**key, "budgets": budgets},
      lambda: _retrieve(bench, story, retriever, budgets),
    )
  if s.answers:
    out["in front"] = bench.kept(
      f"{story.name}-front", key, lambda: _answers(
        [_ask_with(bench, n.fact, n) for n in needs])
    )
  return out


def _ask_all(bench: Bench, story: Story, policy) -> dict:
  s, asked = bench.settings, list(zip(story.needs, story.places))
  hits, answers, raw, forwarded = [], [], [], []
  limit = s.answer_tokens if s.answers else 1
  with bench.opened(bench.tree(story.timeline), policy) as mc:
    mc._loop.warm_up()
    for need, place in asked * (s.rounds if s.in_a_row else 1):
      if isinstance(policy, KnownPlaces):
        policy.places = (place,)
      before = mc._loop.context.tokens_run
      if s.in_a_row:  # joins the history in memory alone
        out = mc._generate(need.question, limit)
      else:
        out = mc.generate(need.question, limit, remember=False)
      hits.append(covered(place, out.focus))
      answers.append(_holds(out.text, need.answer))
      tokens = sum(e.level == 0 and e.start < len(story.timeline)
                   for e in out.focus)
      raw.append(tokens - mc.config.sink_tokens)
      forwarded.append(mc._loop.context.tokens_run - before)
    counters = dict(mc.telemetry.counters)
  steps = max(1, counters.get("refocus_steps", 0))
  last = slice(-len(asked), None)
  return {
    "hit": hits[last], "raw": raw[last], "forwarded": forwarded[last],
    **({"answered": answers[last]} if s.answers else {}),
    "nodes": counters.get("nodes_touched", 0) / steps,
    "bytes": counters.get("bytes_read", 0) / steps,
    "edits": counters.get("edits", 0) / steps,
    "node_flops": getattr(policy, "flops_per_node", KEY_FLOPS),
  }


def _retrieve(bench: Bench, story: Story, retriever: Retriever,
              budgets: list[int]) -> dict:
  """The retriever's best chunks within each question's budget of tokens."""
  ids = story.timeline
  chunks = [ids[a : a + CHUNK] for a in range(0, len(ids), CHUNK)]
  texts = [bench.lm.tokenizer.decode(c.tolist()) for c in chunks]
  scores = retriever(texts, [n.question for n in story.needs])
  hits, asked = [], []
  for need, (start, stop), row, budget in zip(
    story.needs, story.places, scores, budgets
  ):
    count = max(1, budget // CHUNK)
    best = np.sort(np.argsort(-row, kind="stable")[:count]).tolist()
    needed = range(start // CHUNK, (stop - 1) // CHUNK + 1)
    hits.append(set(needed) <= set(best))
    if bench.settings.answers:
      context = "\n".join(texts[i] for i in best)
      asked.append(_ask_with(bench, context, need))
  return {"hit": hits, **(_answers(asked) if asked else {})}


def _answers(asked: list[tuple[bool, int]]) -> dict[str, list]:
  """What `_ask_with` returned, question by question, as an arm's outcome."""
  return {"answered": [a for a, _ in asked], "forwarded": [n for _, n in asked]}


def _ask_with(bench: Bench, context: str, need: planted.Need
              ) -> tuple[bool, int]:
  """Whether the base answers with just `context` before, and tokens run."""
  url = f"memory://{uuid.uuid4()}/tree"
  with MegaContext.create(url, bench.lm, bench.config("recency"),
                          bench.encoder) as mc:
    mc.ingest(context + "\n")
    out = mc.generate(need.question, bench.settings.answer_tokens)
    return _holds(out.text, need.answer), mc._loop.context.tokens_run


def _holds(text: str, answer: str) -> bool:
  return answer.lower() in text.lower()


def _joined(cells: list[dict[str, dict]], arm: str, what: str) -> list:
  return [x for cell in cells for x in cell.get(arm, {}).get(what, [])]


def _table(bench: Bench, report: Report, length: int,
           cells: list[dict[str, dict]]) -> dict[str, dict[str, float]]:
  """Adds one length's table; returns {arm: {figure: value}}."""
  front = _joined(cells, "in front", "answered")
  first = bench.settings.policies[0]
  rows, out = [], {}
  for arm in cells[0]:
    prefix = f"planted/{length}/{arm}"
    answered = _joined(cells, arm, "answered")
    known = [a for a, f in zip(answered, front, strict=True) if f]
    means = dict(zip(_COLUMNS[1:4], map(of_mean, (
      _joined(cells, arm, "hit"), answered, known))))
    shares = [report.add_found(f"{prefix}/{column}", found)
              for column, found in means.items()]
    paired = []
    for column, what in zip(_PAIRED, ("hit", "answered")):
      mine, theirs = (_joined(cells, a, what) for a in (arm, first))
      found = None
      if arm != first and len(theirs) == len(mine):
        found = of_difference(mine, theirs)
      paired.append(report.add_found(f"{prefix}/{column}/minus/{first}", found))
    forwarded = _joined(cells, arm, "forwarded")
    if not all("forwarded" in cell[arm] for cell in cells):
      forwarded = []  # a cell was kept by a version that did not count
    cost = _cost(bench, cells, arm)
    for column, value in cost.items():
      unit = "share" if column == _COLUMNS[7] else "1"
      report.add(f"{prefix}/{column}", value, unit)
    rows.append([arm, *shares, *map(cost.get, _COLUMNS[4:8]), report.add_found(
      f"{prefix}/{_COLUMNS[8]}", of_mean(forwarded), "tokens", 0), *paired])
    out[arm] = cost | {c: found.value for c, found in means.items() if found}
  raw = _joined(cells, bench.settings.policies[0], "raw")
  report.add(f"planted/{length}/facts", len(raw), "questions")
  report.add(f"planted/{length}/budget", float(np.mean(raw)), "tokens")
  report.tables.append(Table(
    f"{len(raw)} planted facts, history {length:,} tokens, window "
    f"{bench.settings.window}, budget {np.mean(raw):.0f} raw tokens",
    (*_COLUMNS, *(f"− {first}: {column}" for column in _PAIRED)), rows,
  ))
  return out


def _cost(bench: Bench, cells: list[dict[str, dict]], arm: str
          ) -> dict[str, float]:
  """{column: value} of an arm's search; nothing where it has none."""
  if "nodes" not in cells[0][arm]:
    return {}
  out = {column: float(np.mean([c[arm][what] for c in cells]))
         for column, what in zip(_COLUMNS[4:7], ("nodes", "bytes", "edits"))}
  flops = out[_COLUMNS[4]] * cells[0][arm]["node_flops"]
  return out | {_COLUMNS[7]: flops / bench.lm.config.flops_per_token}


def _growth(bench: Bench, report: Report, summaries) -> None:
  """The long history relative to the short one."""
  short, long = summaries.values()
  lengths = list(summaries)
  columns = (*_COLUMNS[1:3], *_COLUMNS[4:6])
  rows, lines = [], {}
  for arm in short:
    row = [arm]
    for column in columns:
      a, b = short[arm].get(column), long[arm].get(column)
      row.append(b / a if a and b is not None else None)
      if row[-1] is not None:
        report.add(f"planted/growth/{arm}/{column}", row[-1], "1")
    rows.append(row)
    if short[arm].get(_COLUMNS[4]):
      lines[arm] = (lengths, [short[arm][_COLUMNS[4]],
                              long[arm][_COLUMNS[4]]])
  report.tables.append(Table(
    f"History {lengths[1]:,} relative to {lengths[0]:,} tokens",
    ("policy", *columns), rows,
  ))
  if lines:
    report.charts.append(Chart(
      "Search by length", "tokens of history", "nodes touched per refocus step",
      lines, log_x=True))
