"""Where sentences of tokenised text begin and end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STOPS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
_WRAPPED = range(60, 121)  # characters of a line that is broken as it is full
_OPENING = ("`", "(", '"', "'", "\u201c", "\u2018")  # of a word in a line
_FENCE = "```"  # around code
QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u037e")  # also East Asian, Arabic
_CLOSING = "\"')]*_\u201d\u2019\u300d"  # may stand between a stop and a blank


def sentence_ends(pieces: Sequence[str], special: np.ndarray) -> np.ndarray:
  """Whether a sentence, a line or a turn ends with a token, [T] bool.

  A line as long as wrapped ones are that goes on with a word ends no sentence;
  a longer one is a paragraph.

  Args:
    pieces: [T] what each token adds to the text.
    special: [T] bool, control tokens, each an end of its own.
  """
  out = np.zeros(len(pieces), bool)
  line = " " * _WRAPPED.stop  # where it began is not seen
  for i, piece in enumerate(pieces):
    follows = pieces[i + 1][:1] if i + 1 < len(pieces) else " "
    tail = "".join(pieces[max(0, i - 2) : i + 1])  # ." may be two tokens
    closed = tail.rstrip().rstrip(_CLOSING).endswith(_STOPS)
    closed = closed and bool(piece.strip())
    wide = closed and not piece.isascii()  # East Asian: no blank follows
    line = "" if special[i] else line + piece
    broken = "\n" in piece and not (
      len(line) in _WRAPPED and _goes_on("".join(pieces[i + 1 : i + 4])))
    out[i] = closed and (wide or follows.isspace()) or broken
    if "\n" in piece:
      line = piece.rpartition("\n")[2]
  return out | special


def asks(text: str) -> bool:
  """Whether a sentence ends as questions do."""
  return text.strip().rstrip("\"')*_ ").endswith(QUESTION_MARKS)


def word_start(pieces: Sequence[str], at: int) -> int:
  """The last token up to `at` that begins a word, by what each of T adds."""
  while 0 < at < len(pieces) and not (
      pieces[at][:1].isspace() or pieces[at - 1][-1:].isspace()):
    at -= 1
  return at


def _goes_on(line: str) -> bool:
  """Whether a line that begins so may go on with the sentence before it."""
  return line[:1].isalnum() or (
    line.startswith(_OPENING) and not line.startswith(_FENCE))


def sentence_spans(ends: np.ndarray) -> list[tuple[int, int]]:
  """(start, stop) of the sentences of T tokens, from `sentence_ends` [T]."""
  edges = [0, *(np.flatnonzero(ends) + 1).tolist(), len(ends)]
  return [(a, b) for a, b in zip(edges[:-1], edges[1:]) if a < b]
