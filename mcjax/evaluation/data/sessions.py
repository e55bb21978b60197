"""Two long sessions: on a code base, and a chat about several topics.

The code is that of the running Python's standard library: real, on every
machine, and long enough. Its session loads the files, asks, follows up, shifts
to other files and returns. The chat tells everyday facts with long pasted files
between them and asks for them later, in other words.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.types import McjaxError

Spans = tuple[tuple[int, int], ...]


class Turn(NamedTuple):
  """One question of a session.

  Attributes:
    kind: ask, follow up, shift or return.
    question: the user's words.
    file: where the answer stands: a file, or a topic of the chat.
    part: name of the function or class in it, or the sentence.
    answers: any of which a right answer holds.
  """

  kind: str
  question: str
  file: str
  part: str
  answers: tuple[str, ...]


class Session(NamedTuple):
  """A history and what is asked about it.

  Attributes:
    name: of the session.
    ids: [n] int32 token ids.
    turns: in order.
    evidence: token spans of what answers each turn.
    files: token spans of the file or topic of each turn.
  """

  name: str
  ids: np.ndarray
  turns: tuple[Turn, ...]
  evidence: tuple[Spans, ...]
  files: tuple[Spans, ...]


_FILES = (
  "http/server.py", "queue.py", "json/decoder.py", "smtplib.py", "textwrap.py",
  "logging/handlers.py", "secrets.py", "sched.py", "configparser.py",
  "getpass.py", "tempfile.py", "hmac.py", "socketserver.py", "heapq.py",
  "netrc.py", "calendar.py", "shelve.py", "json/encoder.py")

_CODE = (
  Turn("ask", "Which method of the SMTP client logs in with a user name and a "
       "password?", "smtplib.py", "SMTP.login", ("login",)),
  Turn("follow up", "Which authentication methods does SMTP login prefer?",
       "smtplib.py", "SMTP.login", ("CRAM-MD5",)),
  Turn("follow up", "What does SMTP login raise if the server supports no "
       "suitable authentication method?", "smtplib.py", "SMTP.login",
       ("SMTPException", "SMTPNotSupportedError")),
  Turn("shift", "Let us look at queues instead: how does the priority queue "
       "take out its smallest entry?", "queue.py", "PriorityQueue",
       ("heappop",)),
  Turn("follow up", "And how does the LIFO queue take one out?", "queue.py",
       "LifoQueue", ("pop",)),
  Turn("shift", "How does the scheduler run its events?", "sched.py",
       "scheduler.run", ("priority", "delayfunc", "queue", "pop")),
  Turn("shift", "What does the rotating file handler do in a rollover?",
       "logging/handlers.py", "RotatingFileHandler.doRollover",
       ("rename", "backupCount", "rotate", "close")),
  Turn("follow up", "How does it determine whether a rollover should occur?",
       "logging/handlers.py", "RotatingFileHandler.shouldRollover",
       ("maxBytes", "size")),
  Turn("shift", "Which environment variables are looked at for the directory "
       "of temporary files?", "tempfile.py", "_candidate_tempdir_list",
       ("TMPDIR",)),
  Turn("follow up", "From which characters are the names of temporary files "
       "made?", "tempfile.py", "_RandomNameSequence",
       ("abcdefghijklmnopqrstuvwxyz", "a-z", "lower")),
  Turn("return", "Back to mail: which method puts the SMTP connection into TLS "
       "mode?", "smtplib.py", "SMTP.starttls", ("starttls",)),
  Turn("return", "And which authentication methods did SMTP login prefer?",
       "smtplib.py", "SMTP.login", ("CRAM-MD5",)),
)

_TOPICS = {
  "holiday": (
    "We booked the ferry to Gotland for the ninth of July.",
    "The cottage belongs to a retired beekeeper called Ingvar.",
    "My sister gets seasick, so she will fly to Visby instead.",
    "The bicycles are rented from a shop behind the cathedral."),
  "allotment": (
    "The courgettes were eaten by slugs again last night.",
    "Mrs Okafor from plot seven lends me her wheelbarrow on Sundays.",
    "I planted the garlic in a row along the south fence.",
    "The water pump is shut off from November until the end of March."),
  "band": (
    "Our drummer Teo broke his wrist while skating.",
    "We rehearse on Thursdays in the cellar of the old brewery.",
    "The record label wants four songs by the autumn.",
    "The amplifier hums because its fuse was replaced by foil."),
}
_PASTED = ("textwrap.py", "calendar.py", "heapq.py")

_CHAT = (
  Turn("ask", "On which day do we sail to the island?", "holiday",
       _TOPICS["holiday"][0], ("ninth", "9")),
  Turn("follow up", "Who owns the house where we will stay?", "holiday",
       _TOPICS["holiday"][1], ("Ingvar", "beekeeper")),
  Turn("shift", "What happened to my vegetables?", "allotment",
       _TOPICS["allotment"][0], ("slugs",)),
  Turn("follow up", "Whose wheelbarrow can I borrow?", "allotment",
       _TOPICS["allotment"][1], ("Okafor",)),
  Turn("follow up", "When is there no water from the pump?", "allotment",
       _TOPICS["allotment"][3], ("November", "March")),
  Turn("shift", "Why can the drummer not play?", "band", _TOPICS["band"][0],
       ("wrist",)),
  Turn("follow up", "Where does the band rehearse?", "band",
       _TOPICS["band"][1], ("brewery", "cellar")),
  Turn("follow up", "How many songs does the label expect?", "band",
       _TOPICS["band"][2], ("four", "4")),
  Turn("return", "Back to the trip: how does my sister travel, and why?",
       "holiday", _TOPICS["holiday"][2], ("fly", "seasick")),
  Turn("return", "Where do we get the bikes?", "holiday",
       _TOPICS["holiday"][3], ("cathedral", "shop")),
  Turn("return", "Along which fence did I put the garlic?", "allotment",
       _TOPICS["allotment"][2], ("south",)),
  Turn("return", "Why does the amplifier make a noise?", "band",
       _TOPICS["band"][3], ("fuse", "foil")),
)
NAMES = ("code", "chat")


def make(name: str, tokenizer: Tokenizer) -> Session:
  """A session.

  Args:
    name: one of NAMES.
    tokenizer: of the base.

  Raises:
    McjaxError: no such session.
  """
  if name not in NAMES:
    raise McjaxError(f"no session {name!r}; known: {', '.join(NAMES)}")
  return _code(tokenizer) if name == "code" else _chat(tokenizer)


def source(file: str) -> str:
  """The text of a module of the standard library."""
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  return (folder / file).read_text(encoding="utf-8")


class _Writer:
  """Puts text together and knows where its marked parts lie, in tokens."""

  def __init__(self, tokenizer: Tokenizer):
    self._encode = tokenizer.encode
    self._parts: list[np.ndarray] = []
    self.count = 0

  def add(self, text: str) -> tuple[int, int]:
    start = self.count
    if text:
      self._parts.append(self._encode(text))
      self.count += len(self._parts[-1])
    return start, self.count

  def ids(self) -> np.ndarray:
    return np.concatenate(self._parts).astype(np.int32)


def _code(tokenizer: Tokenizer) -> Session:
  out, places, files = _Writer(tokenizer), {}, {}
  for file in _FILES:
    parts = sorted({t.part for t in _CODE if t.file == file})
    text = source(file)
    spans = {part: definition(text, part) for part in parts}
    start = out.count
    out.add(f"# File: {file}\n\n")
    at = 0
    for part, (a, b) in sorted(spans.items(), key=lambda item: item[1]):
      out.add(text[at:a])
      places[file, part] = (out.add(text[a:b]),)
      at = b
    out.add(text[at:] + "\n\n")
    files[file] = ((start, out.count),)
  return Session("code", out.ids(), _CODE,
                 tuple(places[t.file, t.part] for t in _CODE),
                 tuple(files[t.file] for t in _CODE))


def definition(text: str, name: str) -> tuple[int, int]:
  """Where in a module's text a class, function or method stands.

  Args:
    text: of the module.
    name: with dots, as "SMTP.login".

  Raises:
    McjaxError: it defines no such name.
  """
  node: ast.AST = ast.parse(text)
  for word in name.split("."):
    inside = [n for n in ast.iter_child_nodes(node)
              if isinstance(n, (ast.ClassDef, ast.FunctionDef))
              and n.name == word]
    if not inside:
      raise McjaxError(f"this Python's library defines no {name}")
    node = inside[0]
  assert isinstance(node, (ast.ClassDef, ast.FunctionDef))
  lines = text.splitlines(keepends=True)
  edges = np.cumsum([0, *(len(line) for line in lines)]).tolist()
  return edges[node.lineno - 1], edges[node.end_lineno or node.lineno]


def _chat(tokenizer: Tokenizer) -> Session:
  out, places, files = _Writer(tokenizer), {}, {}
  for (topic, sentences), file in zip(_TOPICS.items(), _PASTED):
    spans = []
    for number, pasted in enumerate(_quarters(source(file))):
      spans.append(out.add(sentences[number]))
      places[topic, sentences[number]] = (spans[-1],)
      out.add(f"\n\nHere is more of {file}:\n\n{pasted}\n\n")
    files[topic] = tuple(spans)
  return Session("chat", out.ids(), _CHAT,
                 tuple(places[t.file, t.part] for t in _CHAT),
                 tuple(files[t.file] for t in _CHAT))


def _quarters(text: str) -> Sequence[str]:
  lines = text.splitlines(keepends=True)
  edges = [len(lines) * n // 4 for n in range(5)]
  return ["".join(lines[a:b]) for a, b in zip(edges[:-1], edges[1:])]
