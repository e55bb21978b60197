"""What a chat template writes around the words of a conversation.

The template never sees the words themselves. It is rendered once for each
sequence of roles, with stand-ins, in a process that has little time and memory
(`template_worker.py`); the words are put in place afterwards. So a template
can neither hang nor fill the memory, words cannot steer it, and it is known of
each character whose it is.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import NamedTuple

from mcjax.base import template_worker
from mcjax.types import McjaxError

MAX_TEMPLATE = 1 << 18  # characters; the longest in the field has 35,000
_WALL_SECONDS = 30  # processor time is what is limited; this ends a stuck one
_LEFT, _RIGHT = " ", "\t"  # around stand-ins, to see what is trimmed
_EXCHANGE = ("user", "assistant")
_MARKER = re.compile(r"\s*<[^<>]+>\s*")
# What every conversation needs is rendered by one process.
_STANDARD = (
  (("user",), True),
  (_EXCHANGE, False),
  ((*_EXCHANGE, "user"), True),
)


class Layout(NamedTuple):
  """A rendering of n messages, their words taken out.

  Attributes:
    pieces: n + 1 template texts before, between and behind the words.
    trims: for each message whether blanks before and behind its words go.
  """

  pieces: tuple[str, ...]
  trims: tuple[tuple[bool, bool], ...]


class Ending(NamedTuple):
  """How a template ends an answer.

  Attributes:
    closed: the text behind any answer; a later turn begins behind it.
    passed: the text between an answer and the words of the next turn.
    last: the text behind an answer that nothing follows.
  """

  closed: str
  passed: str
  last: str


class ChatTemplate:
  """A model's chat template."""

  def __init__(self, source: str, names: tuple[tuple[str, str], ...] = ()):
    """Takes a template; nothing is rendered yet.

    Args:
      source: in Jinja.
      names: variables of the template (`bos_token`, …) and their texts.
    """
    self._source, self._names = source, dict(names)
    self._layouts: dict[tuple, Layout | McjaxError] = {}

  def layout(self, roles: tuple[str, ...], opening: bool) -> Layout:
    """The template's text around messages of these roles.

    Args:
      roles: of the messages, in order.
      opening: whether the model's next answer is opened at the end.

    Raises:
      McjaxError: the template fails, or does not show each message once.
    """
    key = (roles, opening)
    if key not in self._layouts:
      keys = _STANDARD if key in _STANDARD else (key,)
      self._layouts.update(zip(keys, self._render(keys), strict=True))
    found = self._layouts[key]
    if isinstance(found, McjaxError):
      raise McjaxError(str(found))
    return found

  def later(self, roles: tuple[str, ...], opening: bool) -> Layout:
    """As `layout`, of messages behind a finished answer.

    Neither a default system prompt nor a begin-of-text token comes again.
    """
    whole = self.layout((*_EXCHANGE, *roles), opening)
    first = whole.pieces[2].removeprefix(self.ending().closed)
    return Layout((first, *whole.pieces[3:]), whole.trims[2:])

  def ending(self) -> Ending:
    """How the template ends an answer."""
    last = self.layout(_EXCHANGE, False).pieces[2]
    passed = self.layout((*_EXCHANGE, "user"), True).pieces[2]
    if passed.startswith(last):
      return Ending(last, passed, last)
    # A last answer may be closed otherwise than one that a turn follows.
    marker = _MARKER.match(os.path.commonprefix([last, passed]))
    return Ending(marker.group() if marker else "", passed, last)

  def _render(self, keys: tuple) -> list[Layout | McjaxError]:
    if len(self._source) > MAX_TEMPLATE:
      why = f"it is longer than {MAX_TEMPLATE} characters"
      return [_error(why)] * len(keys)
    jobs = [
      {"opening": opening, "conversations": [
        [{"role": r, "content": f"{a}{_stand_in(i)}{b}"}
         for i, r in enumerate(roles)]
        for a, b in (("", ""), (_LEFT, _RIGHT))]}
      for roles, opening in keys
    ]
    answers = _run(self._source, self._names, jobs)
    return [_layout(answer, len(roles))
            for answer, (roles, _) in zip(answers, keys, strict=True)]


@functools.lru_cache(maxsize=64)
def chat_template(
  source: str, names: tuple[tuple[str, str], ...]
) -> ChatTemplate:
  """The template of this text; what it wrote before is remembered."""
  return ChatTemplate(source, names)


def _stand_in(index: int) -> str:
  return f"Qz{index}WordsQz"


def _error(why: str) -> McjaxError:
  return McjaxError(f"the model's chat template fails: {' '.join(why.split())}")


def _run(source: str, names: dict, jobs: list[dict]) -> list[dict]:
  """The worker's answer to each job."""
  request = {"path": sys.path, "template": source, "names": names, "jobs": jobs}
  worker = pathlib.Path(template_worker.__file__)
  try:
    done = subprocess.run(
      [sys.executable, "-I", "-S", str(worker)],
      input=json.dumps(request).encode(), capture_output=True,
      timeout=_WALL_SECONDS, check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as e:
    raise McjaxError(f"cannot render the chat template: {e}") from e
  answers = [json.loads(line) for line in done.stdout.splitlines()]
  if len(answers) < len(jobs):
    answers += [{"error": _end(done)}] * (len(jobs) - len(answers))
  return answers


def _end(done: subprocess.CompletedProcess) -> str:
  """Why a worker ended early."""
  if done.returncode == -signal.SIGPROF:
    return f"it takes more than {template_worker.MAX_SECONDS:g} s"
  lines = done.stderr.decode(errors="replace").split("\n")
  told = [line for line in lines if line.strip()]
  if any("MemoryError" in line for line in told):
    return f"it needs more than {template_worker.MAX_BYTES >> 20} MB"
  last = told[-1] if told else ""
  return f"its process ended with status {done.returncode} {last}"


def _layout(answer: dict, count: int) -> Layout | McjaxError:
  if "error" in answer:
    return _error(answer["error"])
  plain, spaced = (_split(text, count) for text in answer["texts"])
  if plain is None or spaced is None:
    return McjaxError(
      "the chat template does not show the words of every message once")
  kept = [_kept(*pair, i, count) for i, pair in enumerate(zip(plain, spaced))]
  return Layout(tuple(plain), tuple(
    (not kept[i][1], not kept[i + 1][0]) for i in range(count)))


def _kept(plain: str, spaced: str, index: int, count: int) -> tuple[bool, bool]:
  """Whether the blanks of the words before and behind a piece are there."""
  for before in (True, False):
    for behind in (True, False):
      left = _RIGHT if before and index else ""
      right = _LEFT if behind and index < count else ""
      if left + plain + right == spaced:
        return before, behind
  return True, True


def _split(text: str, count: int) -> list[str] | None:
  """Texts around `count` stand-ins that come in order, each once."""
  pieces = []
  for i in range(count):
    before, found, text = text.partition(_stand_in(i))
    if not found or _stand_in(i) in text:
      return None
    pieces.append(before)
  return [*pieces, text]


def checked_messages(messages) -> tuple[tuple[str, ...], list[str]]:
  """Roles and words of messages that have both."""
  if isinstance(messages, (str, Mapping)) or not len(messages):
    raise McjaxError("messages must be a list of {role, content}, not empty")
  for i, message in enumerate(messages):
    for field in ("role", "content"):
      if not isinstance(message, Mapping) or field not in message:
        raise McjaxError(f"message {i} has no {field!r}")
      if not isinstance(message[field], str):
        raise McjaxError(
          f"{field!r} of message {i} must be a string, "
          f"got {type(message[field]).__name__}")
  return (tuple(m["role"] for m in messages), [m["content"] for m in messages])


def alternate(words, pieces) -> list[tuple[str, int]]:
  """(text, owner) of each message with the template's text before it."""
  out = []
  for i, text in enumerate(words):
    out += [(pieces[i], -1), (text, i)]
  return out
