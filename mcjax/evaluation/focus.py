"""Focus: is what a question asks about in detail when the answer begins?

Made-up facts are planted in held-out documents, far apart; every question is
asked from the same window and not remembered. For each policy:

  hit@budget   every token of the fact's sentence is at L0 within the settle
               steps of the question
  answered     the generated answer holds the fact
  in front     the same question with nothing but the fact before it: what the
               base itself can answer

The retriever gets chunks of the same history, as many as fit the raw tokens
that the loop's own window brought in for that question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from mcjax.base.load import BaseLM, load_base_lm
from mcjax.config import Config
from mcjax.evaluation import planted, rag
from mcjax.evaluation.report import Report, Table, progress
from mcjax.runtime import MegaContext
from mcjax.training import data
from mcjax.training.data import TokenStore
from mcjax.types import Entry, McjaxError

CHUNK = 64  # tokens of a retriever's chunk


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is measured.

  Attributes:
    base: named model, folder or file.
    history: tokens of each history.
    histories: how many, of different documents.
    needs: facts per history.
    window: slots.
    policies: to compare; the first sets the retriever's budget.
    answers: generate answers too, not only focus.
    retriever: compare with an embedding retriever.
    seed: of documents, facts and places.
  """

  base: str = "smollm2-135m"
  history: int = 32768
  histories: int = 2
  needs: int = 20
  window: int = 1024
  policies: tuple[str, ...] = ("similarity", "recency", "random")
  answers: bool = True
  retriever: bool = True
  seed: int = 0

  @classmethod
  def quick(cls) -> Settings:
    """A first look, without answers."""
    return cls(histories=1, needs=10, answers=False)


@dataclasses.dataclass
class Case:
  """One question and what came of it, per policy."""

  need: planted.Need
  place: tuple[int, int]
  hit: dict[str, bool] = dataclasses.field(default_factory=dict)
  answered: dict[str, bool] = dataclasses.field(default_factory=dict)
  budget: int = 0


def history_of(stores: Mapping[str, TokenStore], length: int, number: int,
               seed: int) -> np.ndarray:
  """About `length` tokens of whole held-out documents of every kind in turn.

  Raises:
    McjaxError: the stores hold too little text.
  """
  rng = np.random.default_rng([seed, number])
  kinds = sorted(stores)
  orders = {k: rng.permutation(len(stores[k].names)) for k in kinds}
  pieces, size, turn = [], 0, 0
  while size < length:
    kind, row = kinds[turn % len(kinds)], turn // len(kinds)
    if row < len(orders[kind]):
      piece = stores[kind].document(int(orders[kind][row]))[: length // 4]
      pieces.append(np.asarray(piece, np.int32))
      size += len(piece)
    elif all(row >= len(o) for o in orders.values()):
      raise McjaxError(
        f"the held-out documents hold {size} tokens, {length} are wanted; "
        "run tools/prepare_data"
      )
    turn += 1
  return np.concatenate(pieces)[:length]


def covered(place: tuple[int, int], focus: Sequence[Entry]) -> bool:
  """Whether all tokens of [start, stop) are at L0 in a tiling."""
  start, stop = place
  raw = {e.start for e in focus if e.level == 0 and start <= e.start < stop}
  return len(raw) == stop - start


def run(settings: Settings, folder) -> Report:
  """Measures on the held-out store and writes the report into `folder`.

  Raises:
    McjaxError: there is no held-out text; tools/prepare_data makes it.
  """
  lm = load_base_lm(settings.base)
  stores = data.open_split(data.default_folder(), "heldout")
  retriever = _embedding_retriever() if settings.retriever else None
  report = measure(lm, stores, settings, retriever)
  report.write(folder)
  return report


def _embedding_retriever():
  embedder = rag.Embedder()

  def similarities(texts, questions) -> np.ndarray:
    return embedder.encode(questions) @ embedder.encode(texts).T

  return similarities


def measure(lm: BaseLM, stores: Mapping[str, TokenStore], settings: Settings,
        retriever=None) -> Report:
  """Measures every policy, and the retriever if there is one.

  Args:
    lm: the base.
    stores: held-out documents per kind.
    settings: see `Settings`.
    retriever: texts, questions -> similarities [Q, N]; optional.
  """
  cases: list[Case] = []
  touched: dict[str, list[float]] = {p: [] for p in settings.policies}
  swaps: dict[str, list[float]] = {p: [] for p in settings.policies}
  for number in range(settings.histories):
    needs = planted.draw(settings.needs, settings.seed * 1000 + number)
    facts = [lm.tokenizer.encode(f" {n.fact}") for n in needs]
    ids, places = planted.plant(
      history_of(stores, settings.history, number, settings.seed), facts, number
    )
    batch = [Case(n, p) for n, p in zip(needs, places)]
    for policy in settings.policies:
      progress(f"history {number + 1} of {settings.histories}: {policy}")
      telemetry = _ask_all(lm, ids, batch, policy, settings)
      steps = max(1, telemetry["refocus_steps"])
      touched[policy].append(telemetry["nodes_touched"] / steps)
      swaps[policy].append(telemetry["edits"] / steps)
    if retriever is not None:
      progress(f"history {number + 1} of {settings.histories}: retriever")
      _retrieve(lm, ids, batch, retriever, settings)
    if settings.answers:
      _in_front(lm, batch)
    cases += batch
  return _report(cases, settings, touched, swaps)


def _ask_all(lm, ids, cases: list[Case], policy: str, settings: Settings):
  config = Config(window=settings.window, policy=policy, seed=settings.seed)
  with MegaContext.create(f"memory://focus-{id(cases)}-{policy}", lm,
                          config) as mc:
    mc.ingest_tokens(ids)
    for case in cases:
      out = mc.generate(
        case.need.question, 24 if settings.answers else 1, remember=False
      )
      case.hit[policy] = covered(case.place, out.focus)
      if settings.answers:
        case.answered[policy] = _holds(out.text, case.need.answer)
      if policy == settings.policies[0]:
        raw = sum(e.level == 0 and e.start < len(ids) for e in out.focus)
        case.budget = raw - config.sink_tokens
    return mc.telemetry.counters


def _retrieve(lm, ids, cases: list[Case], retriever, settings) -> None:
  """The retriever's best chunks within each case's budget of raw tokens."""
  chunks = [ids[a : a + CHUNK] for a in range(0, len(ids), CHUNK)]
  texts = [lm.tokenizer.decode(c) for c in chunks]
  scores = retriever(texts, [c.need.question for c in cases])
  for case, row in zip(cases, scores):
    count = max(1, case.budget // CHUNK)
    best = np.sort(np.argsort(-row, kind="stable")[:count])
    start, stop = case.place
    needed = range(start // CHUNK, (stop - 1) // CHUNK + 1)
    case.hit["retriever"] = set(needed) <= set(best.tolist())
    if settings.answers:
      context = "\n".join(texts[i] for i in best)
      case.answered["retriever"] = _ask_with(
        lm, context, case.need, settings.window
      )


def _in_front(lm, cases: list[Case]) -> None:
  for case in cases:
    case.answered["in front"] = _ask_with(lm, case.need.fact, case.need, 512)


def _ask_with(lm, context: str, need: planted.Need, window: int) -> bool:
  """Whether the base answers with just `context` before the question."""
  config = Config(window=window, policy="recency")
  url = f"memory://front-{abs(hash((context, need.question)))}"
  with MegaContext.create(url, lm, config) as mc:
    mc.ingest(context + "\n")
    return _holds(mc.generate(need.question, 24).text, need.answer)


def _holds(text: str, answer: str) -> bool:
  return answer.lower() in text.lower()


def _report(cases, settings, touched, swaps) -> Report:
  report = Report("focus", dataclasses.asdict(settings))
  front = [c for c in cases if c.answered.get("in front")]
  rows = []
  for name in [*settings.policies, "retriever", "in front"]:
    hits = [c.hit[name] for c in cases if name in c.hit]
    answers = [c.answered[name] for c in cases if name in c.answered]
    of_front = [c.answered[name] for c in front if name in c.answered]
    if not hits and not answers:
      continue
    row = [name]
    for label, values in (("hit@budget", hits), ("answered", answers),
                          ("answered of in front", of_front)):
      share = float(np.mean(values)) if values else None
      if share is not None:
        report.add(f"{name}/{label}", share, "share")
      row.append(share)
    for label, values in (("nodes touched per step", touched.get(name)),
                          ("edits per step", swaps.get(name))):
      value = float(np.mean(values)) if values else None
      if value is not None:
        report.add(f"{name}/{label}", value, "1")
      row.append(value)
    rows.append(row)
  report.add("cases", len(cases), "questions")
  report.add("budget", float(np.mean([c.budget for c in cases])), "tokens")
  report.tables.append(Table(
    f"{len(cases)} planted facts, history {settings.history:,} tokens, window "
    f"{settings.window}",
    ("policy", "hit@budget", "answered", "of those answered in front",
     "nodes touched / step", "edits / step"),
    rows,
  ))
  report.notes.append(
    "hit@budget: all tokens of the fact at L0 when the answer begins; the "
    f"retriever gets {report.figures['budget'].value:.0f} raw tokens on "
    f"average in chunks of {CHUNK}."
  )
  return report
