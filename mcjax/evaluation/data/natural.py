"""Natural questions about stories and meetings, with where each is answered.

FairytaleQA (Xu et al. 2022): stories in sections, questions written by
education experts. QMSum (Zhong et al. 2021): meetings in turns, questions with
the turns that answer them. Both files keep the published splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import dataclasses
import json
import lzma
import pathlib
from typing import NamedTuple

import numpy as np

import mcjax
from mcjax.base.tokenizer import Tokenizer
from mcjax.types import McjaxError

SOURCES = {"fairytale": "fairytale-questions.jsonl.xz",
           "meeting": "meeting-questions.jsonl.xz"}
SPLITS = ("train", "validation", "test")

Spans = tuple[tuple[int, int], ...]


class Document(NamedTuple):
  """A story or a meeting.

  Attributes:
    title: of it.
    parts: its sections or turns as text, each with its line ends.
    questions: asked about it.
  """

  title: str
  parts: tuple[str, ...]
  questions: tuple[Asked, ...]


class Asked(NamedTuple):
  """A question about a document.

  Attributes:
    text: of the question.
    answers: any of which is right.
    parts: indices of the parts that answer it.
  """

  text: str
  answers: tuple[str, ...]
  parts: tuple[int, ...]


class Question(NamedTuple):
  """A question about a history.

  Attributes:
    text: of the question.
    answers: any of which is right; none where the history does not tell.
    evidence: token spans of the history that answer it.
    document: title of what it is about.
  """

  text: str
  answers: tuple[str, ...]
  evidence: Spans
  document: str


@dataclasses.dataclass(frozen=True)
class History:
  """Several documents as one text.

  Attributes:
    ids: [n] int32 token ids.
    questions: about these documents.
    others: about others of the same split: nothing here answers them.
  """

  ids: np.ndarray
  questions: tuple[Question, ...]
  others: tuple[Question, ...]


def default_folder() -> pathlib.Path:
  """Where the files are looked for: shared/data beside the checkout."""
  return pathlib.Path(mcjax.__file__).parents[2] / "shared/data"


def read(source: str, split: str, path: str = "") -> list[Document]:
  """The documents of a split.

  Args:
    source: one of SOURCES.
    split: one of SPLITS.
    path: of the file; by default `default_folder` is looked at.

  Raises:
    McjaxError: an unknown source or split, or no such file.
  """
  if source not in SOURCES:
    raise McjaxError(f"source must be one of {', '.join(SOURCES)}, "
                     f"got {source!r}")
  if split not in SPLITS:
    raise McjaxError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
  file = pathlib.Path(path) if path else default_folder() / SOURCES[source]
  parse = _story if source == "fairytale" else _meeting
  return [parse(row) for row in read_lines(file) if row["split"] == split]


def read_lines(file: pathlib.Path) -> list[dict]:
  """The objects of an xz-compressed file of JSON lines.

  Raises:
    McjaxError: there is no such file, or it is no such file.
  """
  try:
    with lzma.open(file, "rt", encoding="utf-8") as lines:
      return [json.loads(line) for line in lines]
  except OSError as error:
    raise McjaxError(
      f"cannot read {file}: {error.strerror or error}; name the file with "
      "the setting `data`") from error
  except (lzma.LZMAError, ValueError) as error:
    raise McjaxError(f"{file} holds no xz-compressed JSON lines") from error


def _story(row: dict) -> Document:
  at = {section["id"]: i for i, section in enumerate(row["sections"])}
  return Document(
    row["title"],
    tuple(f"{section['text'].strip()}\n\n" for section in row["sections"]),
    tuple(Asked(q["question"].strip(), tuple(q["answers"]),
                tuple(at[s] for s in q["sections"] if s in at))
          for q in row["questions"]))


def _meeting(row: dict) -> Document:
  def parts(spans):
    return tuple(sorted({i for a, b in spans for i in range(a, b + 1)}))

  return Document(
    row["title"],
    tuple(f"{speaker}: {words.strip()}\n" for speaker, words in row["turns"]),
    tuple(Asked(q["question"].strip(), (q["answer"],), parts(q["spans"]))
          for q in row["questions"]))


def histories(documents: Sequence[Document], tokenizer: Tokenizer, *,
              length: int, count: int, questions: int, others: int = 0,
              seed: int = 0) -> list[History]:
  """Joins documents in a random order, none twice in a history.

  Once all were used they come again in another order, with questions that have
  not been asked yet.

  Args:
    documents: of one split.
    tokenizer: of the base.
    length: tokens of a history, about: it ends with the document that reaches
      it.
    count: histories.
    questions: about each history, spread over its documents.
    others: questions about documents that it does not hold.
    seed: of order and questions.

  Raises:
    McjaxError: the documents do not fill one history.
  """
  rng = np.random.default_rng(seed)
  pieces = [_encoded(d, tokenizer) for d in documents]
  sizes = [sum(len(p) for p in own) for own in pieces]
  if sum(sizes) < length:
    raise McjaxError(f"the documents of this split hold {sum(sizes)} tokens, "
                     f"fewer than {length}")
  left: list[int] = []
  asked: set[tuple[str, str]] = set()
  out = []
  for _ in range(count):
    group: list[int] = []
    while sum(sizes[i] for i in group) < length:
      if not set(left) - set(group):
        left += rng.permutation(len(documents)).tolist()
      group.append(next(i for i in left if i not in group))
      left.remove(group[-1])
    out.append(_history(
      [documents[i] for i in group], [pieces[i] for i in group],
      [d for i, d in enumerate(documents) if i not in group], asked,
      questions, others, rng))
    asked |= {(q.document, q.text) for q in out[-1].questions}
  return out


def _encoded(document: Document, tokenizer: Tokenizer) -> list[np.ndarray]:
  """Ids of the title and of every part."""
  texts = [f"# {document.title}\n\n", *document.parts]
  return [tokenizer.encode(t) if t else np.zeros(0, np.int32) for t in texts]


def _history(group, encoded, rest, known: set, questions: int, others: int,
             rng) -> History:
  asked, start = [], 0
  for document, pieces in zip(group, encoded):
    edges = start + np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    asked.append([
      Question(q.text, q.answers,
               tuple((int(edges[i + 1]), int(edges[i + 2])) for i in q.parts),
               document.title)
      for q in document.questions
      if q.parts and (document.title, q.text) not in known])
    start = int(edges[-1])
  foreign = [Question(q.text, (), (), d.title) for d in rest
             for q in d.questions]
  chosen = [foreign[i] for i in rng.permutation(len(foreign))[:others]]
  ids = np.concatenate([p for pieces in encoded for p in pieces])
  return History(ids.astype(np.int32), _spread(asked, questions, rng),
                 tuple(chosen))


def _spread(asked: list[list[Question]], count: int, rng
            ) -> tuple[Question, ...]:
  """`count` questions, of every document in turn, in a random order."""
  orders = [[group[i] for i in rng.permutation(len(group))] for group in asked]
  turns = [q for n in range(max(map(len, orders), default=0))
           for order in orders for q in order[n : n + 1]]
  chosen = turns[:count]
  return tuple(chosen[i] for i in rng.permutation(len(chosen)))


def most_frequent_answer(documents: Sequence[Document]) -> str:
  """What is answered most often, letter case apart."""
  found = Counter(a.strip().lower() for d in documents for q in d.questions
                  for a in q.answers)
  return found.most_common(1)[0][0]
