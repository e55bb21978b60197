"""Facts hidden in long text: bAbI's in books, and a pass key in noise.

BABILong (Kuratov et al. 2024) scatters the facts of a bAbI task in order
through book text; the books here are other ones, so results are
"BABILong-style". Passkey is that of Mohtashami and Jaggi (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import pathlib
import re

import numpy as np

from mcjax.evaluation.data import natural, ruler
from mcjax.evaluation.data.ruler import Sample
from mcjax.types import McjaxError

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")

_MOVE = re.compile(
  r"(\w+) (?:moved|went|journeyed|travelled)(?: back)? to the (\w+)\.")
_BABI = "babi-test.jsonl.xz"
_BOOKS = "public-domain-books.jsonl.xz"
_ORDER = "Answer with one word or name."
_NOISE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
          "There and back again. ")
_PASSKEY = ("There is an important info hidden inside a lot of irrelevant text."
            " Find it and memorize it. I will quiz you about the important "
            "information there.\n")


@functools.cache
def read_babi(path: str = "") -> tuple[dict, ...]:
  """The rows of bAbI's test part.

  Raises:
    McjaxError: there is no such file.
  """
  file = pathlib.Path(path) if path else natural.default_folder() / _BABI
  return tuple(natural.read_lines(file))


@functools.cache
def read_books(path: str = "") -> tuple[str, ...]:
  """Texts of the books.

  Raises:
    McjaxError: there is no such file.
  """
  file = pathlib.Path(path) if path else natural.default_folder() / _BOOKS
  return tuple(row["text"] for row in natural.read_lines(file))


def questions(rows: Sequence[dict], task: str) -> list[dict]:
  """The rows of a task, in the file's order.

  The file holds no qa1 (where is someone?): it is made of qa6's stories, in
  which people move about in the same way.
  """
  if task != "qa1":
    return [row for row in rows if row["task"] == task]
  made = (_where(row) for row in rows if row["task"] == "qa6")
  return [row for row in made if row is not None]


def _where(row: dict) -> dict | None:
  """Where the last one to move is."""
  for number in reversed(range(len(row["facts"]))):
    move = _MOVE.fullmatch(row["facts"][number])
    if move:
      return {"task": "qa1", "facts": row["facts"], "support": [number],
              "question": f"Where is {move[1]}?", "answer": move[2]}
  return None


def hidden(row: dict, books: Sequence[str], length: int,
           measure: Callable[[str], int], rng: np.random.Generator) -> Sample:
  """A row's facts in order at random sentence ends of book text.

  Args:
    row: of bAbI.
    books: texts; they follow each other in a random order.
    length: tokens of the context, about.
    measure: tokens of a text.
    rng: of books and places.

  Raises:
    McjaxError: the books hold no text.
  """
  facts = row["facts"]
  wanted = length - measure(" ".join(facts)) - measure(row["question"])
  lines = ruler.sentences(_book_text(books, max(wanted, 0), measure, rng))
  places = np.sort(rng.integers(0, len(lines) + 1, len(facts))).tolist()
  parts, start, chars, spans = [], 0, 0, []
  for fact, place in zip(facts, places):
    parts += [*lines[start:place], fact]
    chars += sum(len(line) + 1 for line in lines[start:place])
    spans.append((chars, chars + len(fact)))
    chars, start = chars + len(fact) + 1, place
  return Sample(" ".join([*parts, *lines[start:]]),
                f"{row['question']} {_ORDER}", (row["answer"],),
                tuple(spans[i] for i in sorted(row["support"])))


def _book_text(books: Sequence[str], tokens: int,
               measure: Callable[[str], int], rng) -> str:
  """Book text of about so many tokens, from a random place of each book."""
  if not any(books):
    raise McjaxError("the books hold no text")
  out, have = [], 0
  while have < tokens:
    text = books[int(rng.integers(len(books)))]
    start = int(rng.integers(0, max(1, len(text) // 2)))
    rest = text[start : start + 6 * (tokens - have)]
    count = measure(rest)
    if count > tokens - have:
      rest = rest[: int(len(rest) * (tokens - have) / count)]
      count = tokens - have
    out.append(re.sub(r"\s+", " ", rest))
    have += max(1, count)
  return " ".join(out)


def passkey(length: int, depth: float, measure: Callable[[str], int],
            rng: np.random.Generator) -> Sample:
  """A number at a depth of repeated noise.

  Args:
    length: tokens of the context, about.
    depth: 0 is the beginning, 1 the end.
    measure: tokens of a text.
    rng: of the number.
  """
  key = int(rng.integers(10000, 100000))
  fact = f"The pass key is {key}. Remember it. {key} is the pass key. "
  each = measure(_NOISE * 16) / 16
  count = max(1, int((length - measure(_PASSKEY + fact)) / each))
  before = round(depth * count)
  start = len(_PASSKEY) + before * len(_NOISE)
  return Sample(
    _PASSKEY + _NOISE * before + fact + _NOISE * (count - before),
    "What is the pass key?", (str(key),),
    ((start, start + len(fact.strip())),))
