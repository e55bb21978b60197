"""Natural questions about stories or meetings, every system side by side.

Several documents make one history. Every question is asked of the history as
it was taken in, or all of them in one conversation. Reported are the answers,
and where the evidence is: in the raw window and in what is read, with the whole
window and at equally many tokens of the history for every system.

`evidence_only` runs no base LM: focus, retrieval and the tree alone, so that
hundreds of questions are cheap. Choose on validation, report on test.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from mcjax.base.load import BaseLM
from mcjax.evaluation.data import natural, scoring
from mcjax.evaluation.data.natural import History, Question
from mcjax.evaluation.report.intervals import of_ratio
from mcjax.evaluation.report.writer import (
  Report,
  Table,
  cell,
  make_folder,
  watched,
)
from mcjax.evaluation.suites.side_by_side import Column, add_table
from mcjax.evaluation.systems import make, system
from mcjax.evaluation.systems.loop_system import LoopSystem
from mcjax.evaluation.systems.models import Models, ModelSettings
from mcjax.evaluation.systems.system import Look, Spans, System
from mcjax.types import BRANCHING, McjaxError

_TOLD = ("evidence", "evidence+turn")
_LEAST = {"view": BRANCHING, "equal": BRANCHING, "read": 8}  # tokens found


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
  """What is measured; `quick` makes it small. See `ModelSettings` besides.

  Attributes:
    source: fairytale or meeting.
    data: the file of questions; looked for in shared/data beside the checkout
      if empty.
    split: train, validation or test.
    systems: by name, see `mcjax.evaluation.systems.make`; full attention only
      where the base's positions reach.
    reference: of these; the others are compared with it, and get as many
      tokens of the history as it has in its window.
    window: slots or tokens of every system.
    history: tokens of a history, about.
    histories: how many.
    questions: about each.
    others: questions about each that nothing in it answers.
    conversation: every exchange joins the history; else each question is asked
      of the history as it was taken in.
    evidence_only: no answers: where the evidence is, without the base LM.
    answer_tokens: most tokens of an answer.
    chunk: tokens of a retriever's chunk.
    seed: of histories and questions.
  """

  source: str = "fairytale"
  data: str = ""
  split: str = "validation"
  systems: tuple[str, ...] = (
    "megacontext", "megacontext+gists", "megacontext/similarity",
    "megacontext/recency", "megacontext/random", "megacontext/oracle", "bm25",
    "dense", "fusion", "sliding", "sink", "full", "evidence", "evidence+turn",
    "none")
  reference: str = "megacontext"
  window: int = 1024
  history: int = 32768
  histories: int = 2
  questions: int = 40
  others: int = 8
  conversation: bool = False
  evidence_only: bool = False
  answer_tokens: int = 32
  chunk: int = 64
  seed: int = 0

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      systems=("megacontext", "bm25", "sink", "evidence", "none"),
      history=8192, histories=1, questions=4, others=2)
    return cls(**{**small, **changes})

  def __post_init__(self):
    make.check_all(self.systems, self.reference)
    if self.conversation and self.evidence_only:
      raise McjaxError("evidence_only: a conversation needs its answers")


def run(settings: Settings, folder) -> Report:
  """Asks every system and writes the report; what is there already is kept.

  Raises:
    McjaxError: no such data, base or weights, or too few documents.
  """
  documents = natural.read(settings.source, settings.split, settings.data)
  models = settings.load()
  frequent = ""
  if not settings.evidence_only:
    frequent = natural.most_frequent_answer(
      natural.read(settings.source, "train", settings.data))
  report = measure(models, documents, settings, folder, frequent)
  report.write(folder)
  return report


def measure(models: Models, documents: Sequence[natural.Document], s: Settings,
            folder, frequent: str = "",
            maker: make.Maker | None = None) -> Report:
  """Asks every system about the documents.

  Args:
    models: the base, its GistNet and LensNet.
    documents: of one split.
    s: the settings.
    folder: keeps what is finished.
    frequent: an answer for the floor row; none if empty.
    maker: of the systems; by the settings by default.
  """
  folder, lm = make_folder(folder), models.lm
  found = natural.histories(
    documents, lm.tokenizer, length=s.history, count=s.histories,
    questions=s.questions, others=s.others, seed=s.seed)
  maker = maker or make.Maker(
    models, s.window, folder / "trees", chunk=s.chunk, seed=s.seed)
  longest = max(_tokens(lm, s, history) for history in found)
  order = sorted((name for name in s.systems if make.fits(lm, name, longest)),
                 key=lambda name: name != s.reference)
  if s.reference not in order:
    raise McjaxError(f"reference: {s.reference} does not fit the base")
  outcomes: dict[str, list[dict]] = {name: [] for name in order}
  declined: dict[str, list[dict]] = {name: [] for name in order}
  for number, history in enumerate(found):
    budgets: list[int] = []
    for name in order:
      saved = _cell(folder, s, lm, maker, name, number, history, budgets)
      outcomes[name] += saved["asked"]
      declined[name] += saved["others"]
      budgets = budgets or [o["view_tokens"] for o in saved["asked"]]
  report = Report("questions", dataclasses.asdict(s))
  floors = {} if s.evidence_only else _floors(found, frequent)
  _report(report, s, found, outcomes, declined, floors)
  return report


def _tokens(lm: BaseLM, s: Settings, history: History) -> int:
  """Tokens that a prompt with the whole history and its answer take at most."""
  turns = [len(lm.tokenizer.chat_turn(q.text, first=False)[0])
           for q in (*history.questions, *history.others)]
  said = s.window // 4 if s.conversation else 0
  return (len(history.ids) + said + max(turns, default=0) + s.answer_tokens
          + system.ANSWER)


def _cell(folder: pathlib.Path, s: Settings, lm: BaseLM, maker: make.Maker,
          name: str, number: int, history: History, budgets: list[int]) -> dict:
  """Outcomes of one system on one history, kept in the folder."""
  key = dataclasses.asdict(s)
  del key["systems"], key["histories"]
  key |= {"system": name, "history": number, "budgets": budgets,
          "weights": maker.identity(name)}
  return cell(folder, f"{_slug(name)}-{number}", key,
              lambda: _ask_all(maker.make(name), lm, s, history, budgets))


def _slug(name: str) -> str:
  return name.replace("/", "-")


def _ask_all(asked: System, lm: BaseLM, s: Settings, history: History,
             budgets: list[int]) -> dict:
  asked.ingest(history.ids)
  try:
    rows = [_ask(asked, lm, s, history, i, budgets)
            for i in watched(range(len(history.questions)))]
    others = [] if s.evidence_only else [
      _ask_other(asked, s, q) for q in watched(history.others)]
  finally:
    asked.close()
  return {"asked": rows, "others": others}


def _ask(asked: System, lm: BaseLM, s: Settings, history: History, number: int,
         budgets: list[int]) -> dict:
  question = history.questions[number]
  row: dict = {"group": question.document, "question": question.text}
  if budgets and not isinstance(asked, LoopSystem) and asked.name not in _TOLD:
    equal = asked.look(question.text, budget=budgets[number])
    row |= _evidence("equal", equal.view, question, history, lm)
  if s.evidence_only:
    seen = asked.look(question.text, evidence=question.evidence)
  else:
    out = asked.answer(question.text, s.answer_tokens,
                       evidence=question.evidence, remember=s.conversation)
    seen = out.look
    row |= {"text": out.text, "forwarded": out.forwarded,
            "seconds": out.seconds, "answerable": out.answerable,
            **_scores(out.text, question.answers)}
  row |= _evidence("view", seen.view, question, history, lm)
  row |= _evidence("read", seen.read, question, history, lm)
  if "equal_tokens" not in row:
    row |= {key.replace("view", "equal"): value for key, value in row.items()
            if key.startswith("view_")}
  return row | _moves(seen)


def _ask_other(asked: System, s: Settings, question: Question) -> dict:
  out = asked.answer(question.text, s.answer_tokens)
  return {"group": question.document, "question": question.text,
          "text": out.text, "declines": scoring.declines(out.text),
          "forwarded": out.forwarded, "answerable": out.answerable}


def _moves(seen: Look) -> dict:
  return {"edits": seen.edits}


def _scores(text: str, answers: Sequence[str]) -> dict:
  return {"answered": scoring.holds(text, answers),
          "f1": scoring.token_f1(text, answers),
          "declines": scoring.declines(text)}


def _evidence(name: str, spans: Spans, question: Question, history: History,
              lm: BaseLM) -> dict:
  """What of the evidence lies in spans of the history.

  "found" is a block's worth of its tokens, of what is read a sentence's, or all
  where there are fewer; "told" whether an answer stands there word by word.
  """
  evidence = system.merged(question.evidence)
  both, whole = system.shared(spans, evidence), system.size(evidence)
  text = lm.tokenizer.decode(
    system.gathered(history.ids, spans, history.ids[:0]).tolist())
  return {f"{name}_tokens": system.size(spans),
          f"{name}_found": both >= min(_LEAST[name], whole),
          f"{name}_recall": both / whole,
          f"{name}_told": scoring.holds(text, question.answers)}


def _floors(histories: Sequence[History], frequent: str) -> dict[str, list]:
  """Outcomes of answers that are the same whatever is asked."""
  texts = {"constant: I do not know.": "I do not know."}
  if frequent:
    texts[f"most frequent: {frequent}"] = frequent
  return {
    name: [{"group": q.document, **_scores(text, q.answers)}
           for h in histories for q in h.questions]
    for name, text in texts.items()}


def _report(report: Report, s: Settings, histories, outcomes, declined, floors
            ) -> None:
  count = sum(len(h.questions) for h in histories)
  lengths = np.array([len(h.ids) for h in histories])
  about = (f"{count} questions, {s.source} {s.split}, {len(histories)} "
           f"histories of {lengths.mean():,.0f} tokens")
  report.add("questions", count, "questions")
  report.add("history", float(lengths.mean()), "tokens")
  add_table(report, f"Evidence in the raw window: {about}", "evidence", (
    Column("view_tokens", "raw tokens", "tokens", digits=0),
    Column("view_found", "found", compare=True),
    Column("view_recall", "recall", compare=True),
    Column("view_told", "answer's words"),
    Column("edits", "edits", "edits", digits=1)), outcomes, s.reference)
  add_table(report, f"The same at as many tokens as {s.reference} has", "equal",
            (Column("equal_tokens", "tokens", "tokens", digits=0),
             Column("equal_found", "found", compare=True),
             Column("equal_recall", "recall", compare=True),
             Column("equal_told", "answer's words")), outcomes, s.reference)
  add_table(report, "What is read for the answer", "read", (
    Column("read_tokens", "tokens", "tokens", digits=0),
    Column("read_found", "found", compare=True),
    Column("read_recall", "recall", compare=True),
    Column("read_told", "answer's words", compare=True)), outcomes, s.reference)
  if not s.evidence_only:
    _report_answers(report, s, outcomes, declined, floors)
  report.notes += [
    f"found: {_LEAST['view']} tokens of the evidence or more, in what is read "
    f"{_LEAST['read']}, or all of it. recall: share of its tokens. answer's "
    "words: an answer stands there word by word, which not every one can.",
    "Brackets: 95 % bootstrap over documents; differences question by "
    "question.",
    "invents: answers a question that nothing in the history answers, the rest "
    "of those where it says that it does not know.",
    "edits: expands and collapses for a question. forwarded: tokens that the "
    "base ran on for it; taking in the history costs it none. Seconds are wall "
    "clock."]


def _report_answers(report: Report, s: Settings, outcomes, declined, floors
                    ) -> None:
  alone = "evidence+turn" if "evidence+turn" in outcomes else "evidence"
  best = outcomes.get(alone)
  for rows in (*outcomes.values(), *floors.values()):
    for row, top in zip(rows, best or ()):
      row["relative_f1"] = row["f1"] - top["f1"]
  add_table(report, "Answers", "answers", (
    Column("answered", "answered", compare=True),
    Column("f1", "token F1", compare=True, digits=3),
    Column("relative_f1", "F1 − evidence alone", "F1", digits=3),
    Column("declines", "says it does not know"),
    Column("answerable", "how sure it is of an answer"),
    Column("forwarded", "tokens forwarded", "tokens", digits=0),
    Column("seconds", "seconds", "s", digits=2)), outcomes | floors,
    s.reference)
  if best:
    rows = [[name, *(_ratio(report, f"answers/{name}/{key}/over/{alone}",
                            mine, best, key) for key in ("answered", "f1"))]
            for name, mine in outcomes.items() if name != alone]
    report.tables.append(Table(
      f"Answers over those of {alone}",
      ("system", "answered", "token F1"), rows))
  if s.others:
    for row in (row for rows in declined.values() for row in rows):
      row["invents"] = not row["declines"]
    add_table(report, "Questions that nothing in the history answers",
              "unanswerable", (
                Column("declines", "says it does not know", compare=True),
                Column("invents", "invents an answer", compare=True),
                Column("answerable", "how sure it is of an answer"),
                Column("forwarded", "tokens forwarded", "tokens", digits=0)),
              declined, s.reference)


def _ratio(report: Report, name: str, mine, best, key: str) -> str | None:
  return report.add_found(name, of_ratio(
    [float(row[key]) for row in mine], [float(row[key]) for row in best],
    [row["group"] for row in mine]))
