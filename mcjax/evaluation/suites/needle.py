"""Needles in haystacks: RULER's 13 tasks, BABILong-style facts, a pass key.

Every sample is a history of its own, asked once, for lengths from 4k tokens to
1M. Beside the published scores stands where the evidence is, in the raw window
and in what is read; `evidence_only` asks for that alone and runs no base LM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np

from mcjax.base.load import BaseLM
from mcjax.evaluation.data import hidden_facts, ruler, scoring
from mcjax.evaluation.data.ruler import Sample
from mcjax.evaluation.report.intervals import of_mean
from mcjax.evaluation.report.writer import (
  Report,
  Table,
  cell,
  make_folder,
  watched,
)
from mcjax.evaluation.suites import needle_depths
from mcjax.evaluation.suites.needle_depths import Hit
from mcjax.evaluation.suites.side_by_side import Column, add_table
from mcjax.evaluation.systems import make, system
from mcjax.evaluation.systems.models import Models, ModelSettings
from mcjax.evaluation.systems.system import Look, Spans, System
from mcjax.types import McjaxError

PASSKEY = "passkey"
TASKS = (*ruler.TASKS, *hidden_facts.TASKS, PASSKEY)
_SAID = {"score": "score", "view_recall": "evidence in the raw window"}


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
  """What is measured; `quick` makes it small. See `ModelSettings` besides.

  Attributes:
    babi: bAbI's test part, and books; looked for in shared/data beside the
      checkout if empty.
    tasks: of TASKS.
    systems: by name, see `mcjax.evaluation.systems.make`.
    reference: of these; the others are compared with it.
    window: slots or tokens of every system.
    lengths: tokens of the histories, about.
    samples: of each task and length; of the pass key at each depth.
    depths: of the pass key, 0 the beginning, 1 the end.
    evidence_only: no answers: where the evidence is, without the base LM.
    answer_tokens: most tokens of an answer; as published if 0.
    chunk: tokens of a retriever's chunk.
    seed: of the samples; RULER's published one.
  """

  babi: str = ""
  books: str = ""
  tasks: tuple[str, ...] = TASKS
  systems: tuple[str, ...] = ("megacontext", "bm25", "dense", "fusion", "sink",
                              "full", "evidence")
  reference: str = "megacontext"
  window: int = 1024
  lengths: tuple[int, ...] = (4096, 32768)
  samples: int = 4
  depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
  evidence_only: bool = False
  answer_tokens: int = 0
  chunk: int = 64
  seed: int = ruler.SEED

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      tasks=("niah_single_2", "qa1", PASSKEY), lengths=(4096,), samples=1,
      systems=("megacontext", "bm25", "sink"), depths=(0.5,), answer_tokens=24)
    return cls(**{**small, **changes})

  def __post_init__(self):
    make.check_all(self.systems, self.reference)
    wrong = [t for t in self.tasks if t not in TASKS]
    if wrong:
      raise McjaxError(f"tasks: no task {wrong[0]!r}; known: "
                       f"{', '.join(TASKS)}")


def run(settings: Settings, folder) -> Report:
  """Asks every system and writes the report; what is there already is kept.

  Raises:
    McjaxError: no such data, base or weights.
  """
  models = settings.load()
  report = measure(models, settings, folder)
  report.write(folder)
  return report


def measure(models: Models, s: Settings, folder,
            maker: make.Maker | None = None) -> Report:
  """Asks every system; see `run`.

  Args:
    models: the base, its GistNet and LensNet.
    s: the settings.
    folder: keeps what is finished.
    maker: of the systems; by the settings by default.
  """
  folder, lm = make_folder(folder), models.lm
  trees = folder / "trees"
  maker = maker or make.Maker(
    models, s.window, trees, chunk=s.chunk, seed=s.seed)
  found: dict[int, dict[str, list[dict]]] = {}
  for length in s.lengths:
    answer = s.answer_tokens or max(ruler.ANSWER_TOKENS.values())
    systems = [name for name in s.systems
               if make.fits(lm, name, length + 2 * answer)]
    found[length] = {name: [] for name in systems}
    for task in s.tasks:
      for name in systems:
        found[length][name] += _cell(folder, s, lm, maker, name, task, length)
      shutil.rmtree(trees, ignore_errors=True)  # a sample is asked once
  report = Report("needle", dataclasses.asdict(s))
  _report(report, s, found)
  return report


def _cell(folder: pathlib.Path, s: Settings, lm: BaseLM, maker: make.Maker,
          name: str, task: str, length: int) -> list[dict]:
  """Outcomes of one system on one task and length, kept in the folder."""
  key = dataclasses.asdict(s)
  for other in ("systems", "reference", "tasks", "lengths"):
    del key[other]
  key |= {"system": name, "task": task, "length": length,
          "weights": maker.identity(name)}
  slug = f"{name.replace('/', '-')}-{task}-{length}"
  return cell(folder, slug, key, lambda: _ask_all(
    maker.make(name), lm, s, task, length))


def _ask_all(asked: System, lm: BaseLM, s: Settings, task: str, length: int
             ) -> list[dict]:
  out = []
  for depth, sample in watched(list(make_samples(lm, s, task, length))):
    ids, evidence = encode(lm, sample)
    asked.ingest(ids)
    try:
      row = _ask(asked, s, task, sample, evidence, len(ids))
    finally:
      asked.close()
    out.append({"task": task, "depth": depth, "length": len(ids), **row})
  return out


def make_samples(lm: BaseLM, s: Settings, task: str, length: int
                 ) -> Iterator[tuple[float | None, Sample]]:
  """The samples of a task, with the depth of a pass key."""
  def tokens(text: str) -> int:
    return len(lm.tokenizer.encode(text)) if text else 0
  if task in ruler.TASKS:
    for sample in ruler.samples(task, length, s.samples, tokens, s.seed):
      yield None, sample
    return
  rng = np.random.default_rng([s.seed, TASKS.index(task), length])
  if task == PASSKEY:
    for depth in s.depths:
      for _ in range(s.samples):
        yield depth, hidden_facts.passkey(length, depth, tokens, rng)
    return
  rows = hidden_facts.questions(hidden_facts.read_babi(s.babi), task)
  books = hidden_facts.read_books(s.books)
  for number in rng.permutation(len(rows))[: s.samples]:
    yield None, hidden_facts.hidden(rows[number], books, length, tokens, rng)


def encode(lm: BaseLM, sample: Sample) -> tuple[np.ndarray, Spans]:
  """Token ids of the context, and the spans of its evidence.

  Text around the evidence is encoded apart from it, so that the spans are
  exact.
  """
  text, at, parts = sample.context, 0, []
  spans, count = [], 0
  for start, stop in system.merged(sample.evidence):
    for piece, wanted in ((text[at:start], False), (text[start:stop], True)):
      ids = lm.tokenizer.encode(piece) if piece else np.zeros(0, np.int32)
      parts.append(ids)
      spans += [(count, count + len(ids))] * wanted
      count += len(ids)
    at = stop
  if text[at:]:
    parts.append(lm.tokenizer.encode(text[at:]))
  return np.concatenate(parts).astype(np.int32), system.merged(spans)


def _ask(asked: System, s: Settings, task: str, sample: Sample,
         evidence: Spans, length: int) -> dict:
  row: dict = {}
  if s.evidence_only:
    seen = asked.look(sample.question, evidence=evidence)
  else:
    limit = s.answer_tokens or ruler.ANSWER_TOKENS.get(task, 24)
    out = asked.answer(sample.question, limit, evidence=evidence)
    seen = out.look
    row = {"text": out.text, "forwarded": out.forwarded,
           "seconds": out.seconds,
           "score": score(task, out.text, sample.answers)}
  row["view_tokens"] = system.size(seen.view)
  row["read_tokens"] = system.size(seen.read)
  places = []
  for answers, spans in parts(task, sample, evidence):
    place = {"depth": float(np.mean([a for a, _ in spans])) / length,
             **_recalls(seen, spans)}
    if "text" in row:
      place["score"] = score(task, row["text"], answers)
    places.append(place)
  return {**row, **_recalls(seen, evidence), "places": places}


def _recalls(seen: Look, evidence: Spans) -> dict[str, float]:
  """The shares of the evidence's tokens in the window and in what is read."""
  whole = system.size(evidence)
  return {f"{name}_recall": system.shared(spans, evidence) / whole
          for name, spans in (("view", seen.view), ("read", seen.read))
          if whole}


def parts(task: str, sample: Sample, evidence: Spans
          ) -> list[tuple[Sequence[str], Spans]]:
  """What is looked for, each with the tokens that tell it.

  Every needle of RULER's tells a value of its own; the facts of a question
  tell one together. Nothing where the places are not of such a kind.
  """
  if task in hidden_facts.TASKS:
    return [(sample.answers, evidence)]
  if task not in ruler.NEEDLES:
    return []
  told = sorted(zip(sample.evidence, sample.answers))
  if len(told) != len(evidence):  # two needles became one span of tokens
    return []
  return [((answer,), (span,)) for (_, answer), span in zip(told, evidence)]


def score(task: str, text: str, answers: Sequence[str]) -> float:
  """The task's score of an answer, in [0, 1]."""
  if task in ruler.TASKS:
    return ruler.score(task, text, answers)
  return float(scoring.holds(text, answers))


def group(task: str) -> str:
  """The kind of task: tables show means of these."""
  if task in hidden_facts.TASKS:
    return "facts in books"
  if task.startswith("niah"):
    return task.removeprefix("niah_").rstrip("_0123456789")
  names = {"vt": "variables", "cwe": "counting words", "fwe": "counting words",
           "qa_1": "questions", "qa_2": "questions"}
  return names.get(task, task)


def _report(report: Report, s: Settings, found) -> None:
  columns = [] if s.evidence_only else [
    Column("score", "score", compare=True),
    Column("forwarded", "tokens forwarded", "tokens", digits=0),
    Column("seconds", "seconds", "s", digits=1)]
  columns += [Column("view_tokens", "raw tokens", "tokens", digits=0),
              Column("view_recall", _SAID["view_recall"], compare=True),
              Column("read_recall", "in what is read", compare=True)]
  main = "view_recall" if s.evidence_only else "score"
  for length, systems in found.items():
    tasks = ", ".join(dict.fromkeys(s.tasks))
    add_table(report, f"All tasks, {length:,} tokens ({tasks})",
              f"{length}/all", columns, systems, s.reference, group="task")
    _by_group(report, s, length, systems, main)
  _depths(report, s, found, main)
  report.notes += [
    f"By kind of task and depth: {_SAID[main]}. RULER's scores are "
    "its string match; facts in books and pass keys: the answer's words stand "
    "in a row. Evidence: share of the tokens of the sentences that answer; "
    "where words are counted there is none.",
    "By depth, 0 the beginning: every needle of RULER's for itself, by where "
    "it happened to lie; of facts in books the mean depth of those that answer."
    " Brackets there: over samples.",
    "Facts in books are BABILong-style: bAbI's test part in other books; qa1 "
    "is made of qa6's stories.",
    "Brackets: 95 % bootstrap over samples, in the first tables over tasks; "
    "forwarded: tokens that the base ran on for an answer. Seconds are wall "
    "clock."]


def _by_group(report: Report, s: Settings, length: int, systems, main: str
              ) -> None:
  groups = list(dict.fromkeys(group(t) for t in s.tasks))
  rows = []
  for name, outcomes in systems.items():
    cells: list[str | None] = []
    for kind in groups:
      mine = [o.get(main, float("nan")) for o in outcomes
              if group(o["task"]) == kind]
      cells.append(report.add_found(f"{length}/{kind}/{name}/{main}",
                                    of_mean(mine), counted="samples"))
    for task in s.tasks:
      report.add_found(f"{length}/{task}/{name}/{main}", of_mean([
        o.get(main, float("nan")) for o in outcomes if o["task"] == task]),
        counted="samples")
    rows.append([name, *cells])
  report.tables.append(Table(
    f"By kind of task, {length:,} tokens", ("system", *groups), rows))


def _depths(report: Report, s: Settings, found, main: str) -> None:
  """Tables and heat maps of what is found, by where it lay."""
  if PASSKEY in s.tasks:
    needle_depths.add(
      report, "Pass key", PASSKEY, {str(d): f"{d:g}" for d in s.depths},
      _hits(found, main, lambda o: [(s.depths.index(o["depth"]), o)]
            if o["task"] == PASSKEY else []), main, _SAID[main])
  kinds = {"Needles": [t for t in s.tasks if t in ruler.NEEDLES],
           "Facts in books": [t for t in s.tasks if t in hidden_facts.TASKS]}
  for title, tasks in kinds.items():
    if tasks:
      needle_depths.add(
        report, title, title.lower(), needle_depths.QUARTERS,
        _hits(found, main, lambda o, tasks=tasks: [
          (needle_depths.quarter(p["depth"]), p) for p in o.get("places", ())]
          if o["task"] in tasks else []), main, _SAID[main], title.lower())


def _hits(found, main: str, places: Callable[[dict], Iterable[tuple[int, dict]]]
          ) -> dict[int, dict[str, list[Hit]]]:
  """{length: {system: needles}}; `places` are an outcome's columns and rows."""
  return {
    length: {
      name: [Hit(column, row[main], number)
             for number, outcome in enumerate(outcomes)
             for column, row in places(outcome) if main in row]
      for name, outcomes in systems.items()}
    for length, systems in found.items()}
