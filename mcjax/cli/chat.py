"""Answers on the command line: one prompt, or a chat on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import re
import signal
import sys
import threading
import time

from mcjax.cli.focus_map import Section, focus_map, source_lines
from mcjax.runtime.megacontext import MegaContext

_HELP = """\
/help      this
/quit      end the chat; so do Ctrl-D and an empty line
/documents what was ingested
/focus     what the window shows, at which level of detail
Ctrl-C     end an answer
All else is a question."""
_COMMAND = re.compile(r"/[a-z]+\s*")


@dataclasses.dataclass(frozen=True)
class Chat:
  """A history to talk to.

  Attributes:
    mc: the history.
    max_new_tokens: of an answer, at most.
    sources: whether each answer is followed by what it was read from.
    focus: whether it is followed by the focus.
  """

  mc: MegaContext
  max_new_tokens: int
  sources: bool = True
  focus: bool = False

  def answer(self, prompt: str) -> None:
    """Prints the answer as it comes, then what it was read from (stderr)."""
    empty = not self.mc.cursor
    with _interruptible() as check:

      def on_piece(piece: str) -> None:
        print(piece, end="", flush=True)
        check()

      out = self.mc.generate(prompt, self.max_new_tokens, on_piece=on_piece)
    print(flush=True)
    if self.sources and out.sources:
      print("Read from:\n" + source_lines(out.sources), file=sys.stderr)
    elif self.sources:
      print("Read from: nothing; the history was empty." if empty else
            "Read from: no passage in particular, but all that the window "
            "shows in full.", file=sys.stderr)
    if self.focus:
      print(focus_map(self.mc.focus(), _sections(self.mc)), file=sys.stderr)

  def run(self) -> None:
    """Takes questions from standard input until it ends, or /quit."""
    interactive = sys.stdin.isatty()
    if interactive:
      print("Ask something. /help tells the commands; /quit, Ctrl-D or an "
            "empty line ends the chat.", file=sys.stderr)
    while True:
      try:
        prompt = input("> " if interactive else "")
        if not (prompt.strip() or interactive):
          continue
        if not interactive:
          print(f"> {prompt}")
        if not self._turn(prompt.strip()):
          break
      except EOFError:
        break
      except KeyboardInterrupt:
        if not interactive:
          raise
        print()

  def _turn(self, line: str) -> bool:
    """Does what a line asks for; returns whether the chat goes on."""
    if line in ("", "/quit", "/exit"):
      return False
    if not _COMMAND.fullmatch(line):
      self.answer(line)
    elif line == "/help":
      print(_HELP)
    elif line == "/documents":
      print(document_lines(self.mc))
    elif line == "/focus":
      print(focus_map(self.mc.focus(), _sections(self.mc)))
    else:
      print(f"{line} is no command; /help tells them all")
    return True


def document_lines(mc: MegaContext) -> str:
  """A line for each document: when it came in, its size, its name."""
  lines = []
  for d in mc.documents():
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(d.time))
    lines.append(f"{day}  {d.stop - d.start:>10,} tokens  {d.name}")
  return "\n".join(lines)


def _sections(mc: MegaContext) -> list[Section]:
  """The history cut into documents and what lies between them."""
  sections, at = [], 0
  for d in mc.documents():
    if d.start > at:
      sections.append(Section("(conversation)", at, d.start))
    sections.append(Section(d.name, d.start, d.stop))
    at = d.stop
  if mc.cursor > at:
    sections.append(Section("(conversation)", at, mc.cursor))
  return sections


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
  """Lets Ctrl-C end an answer where it can be ended cleanly.

  Yields a function to call there, which raises KeyboardInterrupt once Ctrl-C
  was pressed. Pressed again it interrupts at once.
  """
  pressed = False

  def note(number, frame) -> None:
    nonlocal pressed
    if pressed:
      raise KeyboardInterrupt
    pressed = True

  def check() -> None:
    if pressed:
      raise KeyboardInterrupt

  if threading.current_thread() is not threading.main_thread():
    yield check
    return
  kept = signal.signal(signal.SIGINT, note)
  try:
    yield check
  finally:
    signal.signal(signal.SIGINT, kept)
