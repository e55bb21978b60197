"""A coding session and a chat, turn by turn, every system side by side.

The mission's scene: a code base is loaded, asked about, followed up, left for
other files and returned to, in one conversation. Reported for every turn: what
of the evidence stands raw in the window, what share of the window is the file
in question, how much was swapped, and whether the answer holds what it must.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from mcjax.evaluation.data import sessions
from mcjax.evaluation.data.sessions import Session
from mcjax.evaluation.report.writer import (
  Chart,
  Report,
  Table,
  cell,
  make_folder,
  watched,
)
from mcjax.evaluation.suites.side_by_side import Column, add_table
from mcjax.evaluation.systems import make, system
from mcjax.evaluation.systems.models import Models, ModelSettings
from mcjax.evaluation.systems.system import Reply, System
from mcjax.types import BRANCHING, McjaxError


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
  """What is measured; `quick` makes it small. See `ModelSettings` besides.

  Attributes:
    sessions: code, chat or both.
    systems: by name, see `mcjax.evaluation.systems.make`.
    reference: of these; the others are compared with it.
    window: slots or tokens of every system.
    answer_tokens: most tokens of an answer.
    turns: of each session, at most.
    chunk: tokens of a retriever's chunk.
    seed: of policy random.
  """

  sessions: tuple[str, ...] = sessions.NAMES
  systems: tuple[str, ...] = (
    "megacontext", "megacontext/similarity", "megacontext/recency",
    "megacontext/oracle", "bm25", "dense", "fusion", "sink", "evidence")
  reference: str = "megacontext"
  window: int = 2048
  answer_tokens: int = 48
  turns: int = 12
  chunk: int = 64
  seed: int = 0

  @classmethod
  def quick(cls, **changes) -> Settings:
    small: dict[str, Any] = dict(
      sessions=("chat",), systems=("megacontext", "bm25", "sink"), window=1024,
      answer_tokens=16, turns=3)
    return cls(**{**small, **changes})

  def __post_init__(self):
    make.check_all(self.systems, self.reference)
    wrong = [n for n in self.sessions if n not in sessions.NAMES]
    if wrong:
      raise McjaxError(f"sessions: no session {wrong[0]!r}; known: "
                       f"{', '.join(sessions.NAMES)}")


def run(settings: Settings, folder) -> Report:
  """Holds the sessions with every system; what is there already is kept.

  Raises:
    McjaxError: the models cannot be loaded.
  """
  models = settings.load()
  found = [sessions.make(name, models.lm.tokenizer)
           for name in settings.sessions]
  report = measure(models, found, settings, folder)
  report.write(folder)
  return report


def measure(models: Models, found: list[Session], s: Settings, folder,
            maker: make.Maker | None = None) -> Report:
  """Holds the sessions; see `run`.

  Args:
    models: the base, its GistNet and LensNet.
    found: the sessions.
    s: the settings.
    folder: keeps what is finished.
    maker: of the systems; by the settings by default.
  """
  folder = make_folder(folder)
  maker = maker or make.Maker(
    models, s.window, folder / "trees", chunk=s.chunk, seed=s.seed)
  report = Report("session", dataclasses.asdict(s))
  for session in found:
    outcomes = {name: _cell(folder, s, maker, name, session)
                for name in s.systems}
    _report(report, s, session, outcomes)
  report.notes += [
    f"found: {BRANCHING} tokens of the evidence or more, or all of it, stand "
    "raw in the window. file: share of the window's raw tokens that belong to "
    "the file or topic in question. brought in, put away: tokens of the history"
    " since the turn before. edits: expands and collapses. answered: the answer"
    " holds a word that it must.",
    "Brackets: 95 % bootstrap over turns; differences turn by turn. forwarded: "
    "tokens that the base ran on. Seconds are wall clock."]
  return report


def _cell(folder: pathlib.Path, s: Settings, maker: make.Maker, name: str,
          session: Session) -> list[dict]:
  key = dataclasses.asdict(s)
  for other in ("systems", "sessions", "reference"):
    del key[other]
  key |= {"system": name, "tokens": len(session.ids),
          "weights": maker.identity(name)}
  slug = f"{session.name}-{name.replace('/', '-')}"
  return cell(folder, slug, key,
              lambda: _hold(maker.make(name), s, session))


def _hold(asked: System, s: Settings, session: Session) -> list[dict]:
  asked.ingest(session.ids)
  out = []
  try:
    for number, turn in enumerate(watched(session.turns[: s.turns])):
      evidence = system.merged(session.evidence[number])
      reply = asked.answer(turn.question, s.answer_tokens, evidence=evidence,
                           remember=True)
      out.append({"turn": number + 1, "kind": turn.kind,
                  **_scores(session, number, reply)})
  finally:
    asked.close()
  return out


def _scores(session: Session, number: int, reply: Reply) -> dict:
  turn, look = session.turns[number], reply.look
  evidence = system.merged(session.evidence[number])
  file = system.merged(session.files[number])
  whole, raw = system.size(evidence), system.size(look.view)
  both = system.shared(look.view, evidence)
  text = reply.text.lower()
  return {
    "found": both >= min(BRANCHING, whole), "recall": both / whole,
    "read": system.shared(look.read, evidence) / whole, "raw": raw,
    "file": system.shared(look.view, file) / raw if raw else 0.0,
    "edits": look.edits, "brought": look.brought, "put_away": look.put_away,
    "answered": any(a.lower() in text for a in turn.answers),
    "text": reply.text, "forwarded": reply.forwarded, "seconds": reply.seconds}


def _report(report: Report, s: Settings, session: Session, outcomes) -> None:
  add_table(
    report, f"{session.name}: {len(session.turns[: s.turns])} turns behind "
    f"{len(session.ids):,} tokens, W={s.window}", session.name, (
      Column("found", "found", compare=True),
      Column("recall", "evidence in the raw window"),
      Column("read", "in what is read"),
      Column("answered", "answered", compare=True),
      Column("raw", "raw tokens", "tokens", digits=0),
      Column("file", "file"), Column("edits", "edits", "edits", digits=1),
      Column("brought", "brought in", "tokens", digits=0),
      Column("put_away", "put away", "tokens", digits=0),
      Column("forwarded", "tokens forwarded", "tokens", digits=0),
      Column("seconds", "seconds", "s", digits=1)),
    outcomes, s.reference)
  rows = []
  for number, turn in enumerate(session.turns[: s.turns]):
    marks = [("found" if o[number]["found"] else "–")
             + (", answered" if o[number]["answered"] else "")
             for o in outcomes.values()]
    rows.append([number + 1, turn.kind, turn.question, *marks])
  report.tables.append(Table(
    f"{session.name}, turn by turn", ("turn", "kind", "question", *outcomes),
    rows))
  for key, title in (("recall", "evidence in the raw window"),
                     ("file", "share of the window that is the file")):
    report.charts.append(Chart(
      f"{session.name}, by turn: {title}", "turn", "share", {
        name: ([o["turn"] for o in mine], [o[key] for o in mine])
        for name, mine in outcomes.items()}))
