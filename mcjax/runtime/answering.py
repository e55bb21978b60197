"""One answer: what is asked for, and the steps from prompt to closed turn."""

from __future__ import annotations

from collections.abc import Callable, Generator
import dataclasses
import time

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.runtime.answer_text import AnswerText
from mcjax.runtime.documents import Source
from mcjax.runtime.focus_loop import FocusLoop
from mcjax.runtime.results import Generation
from mcjax.types import BRANCHING, McjaxError
from mcjax.window.decode_loop import LIKELY
from mcjax.window.decoding import Job, Said
from mcjax.window.sampling import Sampling

_STREAMED = 4  # tokens between two pieces of a streamed answer
_MOST_STOPS = 16


@dataclasses.dataclass(frozen=True)
class Request:
  """What one `generate` asks for, see there.

  Attributes:
    max_new_tokens: 0 settles the focus only.
    sampling: how tokens are drawn.
    stop: strings that end the answer.
    seed: of the drawing; None draws unlike any answer before.
    logprobs: whether they are wanted.
    top_logprobs: how many of the likeliest tokens are listed beside each.
    on_piece: gets the new text every few tokens.
    on_text: gets the whole text so far after every block.
  """

  max_new_tokens: int
  sampling: Sampling
  stop: tuple[str, ...] = ()
  seed: int | None = None
  logprobs: bool = False
  top_logprobs: int = 0
  on_piece: Callable[[str], None] | None = None
  on_text: Callable[[str], None] | None = None

  def __post_init__(self):
    count = self.max_new_tokens
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
      raise McjaxError(
        f"max_new_tokens must be a whole number >= 0, got {count}")
    likely = self.top_logprobs
    if not isinstance(likely, int) or isinstance(likely, bool) or not (
        0 <= likely <= LIKELY):
      raise McjaxError(
        f"top_logprobs must be a whole number in [0, {LIKELY}], got {likely!r}")
    if self.seed is not None and (
        not isinstance(self.seed, int) or not 0 <= self.seed < 2**63):
      raise McjaxError(f"seed must be a whole number >= 0, got {self.seed}")
    if len(self.stop) > _MOST_STOPS or not all(
        isinstance(s, str) and s for s in self.stop):
      raise McjaxError(
        f"stop must be at most {_MOST_STOPS} strings that are not empty, got "
        f"{self.stop!r}")


class Stopped(BaseException):
  """Carries what a caller's function raised, once its turn is closed."""

  def __init__(self, cause: BaseException):
    super().__init__()
    self.cause = cause


def steps(loop: FocusLoop, ids: np.ndarray, closing: np.ndarray,
          request: Request, sources_of: Callable[[], list[Source]],
          ) -> Generator[Job, Said, Generation]:
  """Yields decode jobs and takes what was said; returns the answer.

  The turn is closed at the end, also where the reader of its pieces has left.

  Args:
    loop: with the query set.
    ids: [n] the prompt.
    closing: ids that close the turn.
    request: what is wanted.
    sources_of: passages that answer, once the focus has settled.

  Raises:
    Stopped: by what `on_piece` has raised, after the turn is closed.
    Whatever `on_text` raises, at once.
  """
  begin, asked = time.perf_counter(), loop.tree.cursor
  loop.append(ids)
  loop.settle()
  loop.attend()
  seen = loop.spans() if loop.telemetry.detailed else {}
  focus, sources = loop.context.window.focus(), sources_of()
  loop.sync()
  first = time.perf_counter() - begin
  tokenizer = loop.context.lm.tokenizer
  answer = AnswerText(tokenizer, request.stop)
  out: list[int] = []
  logprobs: list[float] = []
  likely: list[tuple[np.ndarray, np.ndarray]] = []
  draw = loop.draw(request.sampling, request.seed, ids)
  draw.logprobs, draw.likely = request.logprobs, request.top_logprobs
  most = BRANCHING if request.on_piece is None else _STREAMED
  stopped, failure = False, None

  def cut(said: Said) -> Said:
    count = answer.add(said.tokens, said.stopped)
    if said.stopped and count == len(said.tokens):
      count -= _opens_a_turn(tokenizer, said.tokens[-1])
    return said._replace(
      tokens=said.tokens[:count], logprobs=said.logprobs[:count],
      likely=said.likely[:count],
      likely_logprobs=said.likely_logprobs[:count], stopped=answer.ended)

  while len(out) < request.max_new_tokens and not answer.ended:
    said = yield from loop.block(
      request.max_new_tokens - len(out), draw, most, cut)
    stopped = answer.ended
    out += said.tokens.tolist()
    logprobs += said.logprobs.tolist()
    likely.append((said.likely, said.likely_logprobs))
    more = not stopped and len(out) < request.max_new_tokens
    if request.on_text is not None:
      request.on_text(answer.text())
    piece = answer.piece(not more) if request.on_piece is not None else ""
    if request.on_piece is not None and piece:
      try:
        request.on_piece(piece)
      except BaseException as error:  # the turn is closed first
        failure = error
        break
    if more:
      loop.go_on()
  loop.append(_unsaid(closing, out[-1:] if stopped else []))
  seconds = time.perf_counter() - begin
  loop.telemetry.record(
    "generate", tokens=len(out), prompt_tokens=len(ids), seconds=seconds,
    first_token_seconds=first, sources=[(s.start, s.stop) for s in sources],
    start=asked, cursor=loop.tree.cursor, **seen)
  if failure is not None:
    raise Stopped(failure)
  return Generation(
    answer.text(), np.array(out, np.int32), len(ids), seconds, first, focus,
    sources, loop.answerable, "stop" if stopped else "length",
    np.array(logprobs, np.float32)
    if request.logprobs or request.top_logprobs else None,
    _listed(likely) if request.top_logprobs and likely else None)


def _listed(parts: list[tuple[np.ndarray, np.ndarray]]
            ) -> tuple[np.ndarray, np.ndarray]:
  ids, logprobs = zip(*parts)
  return np.concatenate(ids), np.concatenate(logprobs)


def _opens_a_turn(tokenizer: Tokenizer, token_id: int) -> bool:
  """Whether the model went on to the next turn's marker.

  So it ends an answer where its template closes none; the next prompt brings
  the marker itself.
  """
  return token_id in tokenizer.question_ids[:1]


def _unsaid(closing: np.ndarray, said: list[int]) -> np.ndarray:
  """The closing ids the model has not generated itself."""
  if said and len(closing) and said[-1] == closing[0]:
    return closing[1:]
  return closing
