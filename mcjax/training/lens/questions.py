"""Natural questions about stories and meetings, as histories.

With the sections or turns that answer them, and the sentences in these that
share most words with the answer. One in seven is asked of other texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
import json
import lzma
import re

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.training.lens import facts as made_up
from mcjax.training.lens.prompts import (
  LENGTH,
  History,
  Talk,
  common_words,
  leaning,
  words_of,
)
from mcjax.types import McjaxError

_FOREIGN = 7  # one question in so many is asked of another history
_NEAR = 0.8  # of the best sentence's shared words that others must share
_SENTENCE = re.compile(r"(?<=[.!?\"\u201d])\s+")


def read_questions(path, split: str, tokenizer: Tokenizer) -> list[tuple]:
  """Documents of a split: (ids, [(question, gold, best spans, answer)]).

  Args:
    path: JSON lines, xz-compressed; documents of "sections" or of "turns".
    split: train, validation or test.
    tokenizer: of the base.

  Raises:
    McjaxError: the file cannot be read.
  """
  try:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
      records = [json.loads(line) for line in lines]
  except (OSError, ValueError, lzma.LZMAError) as error:
    raise McjaxError(f"cannot read questions from {path}: {error}") from error
  return [_document(r, tokenizer) for r in records if r["split"] == split]


def _document(record: dict, tokenizer: Tokenizer) -> tuple:
  if "sections" in record:
    parts = [(str(s["id"]), s["text"] + "\n\n") for s in record["sections"]]
  else:
    parts = [(str(i), f"{who}: {words}\n")
             for i, (who, words) in enumerate(record["turns"])]
  pieces = [tokenizer.encode(text) for _, text in parts]
  edges = np.cumsum([0, *map(len, pieces)]).tolist()
  text, asked = _Sentences([text for _, text in parts], pieces), []
  for q in record["questions"]:
    if "sections" in q:
      found = [i for i, (name, _) in enumerate(parts)
               if name in {str(s) for s in q["sections"]}]
    else:
      found = sorted({i for a, b in q["spans"]
                      for i in range(a, min(b + 1, len(parts)))})
    if found:
      answer = q.get("answer") or " ".join(q["answers"])
      asked.append((q["question"], [(edges[i], edges[i + 1]) for i in found],
                    text.telling(found, answer), answer))
  return np.concatenate(pieces).astype(np.int32), asked


class _Sentences:
  """The sentences of a document's parts, and which of them tell an answer."""

  def __init__(self, texts: Sequence[str], pieces: Sequence[np.ndarray]):
    self._of: list[list[tuple[tuple[int, int], set[str]]]] = []
    start = 0
    for text, ids in zip(texts, pieces):
      per_byte = len(ids) / max(1, len(text.encode()))  # about
      own, at = [], 0
      for sentence in _SENTENCE.split(text):
        size = len(sentence.encode()) + 1
        a, b = int(at * per_byte), int(np.ceil((at + size) * per_byte))
        own.append(((start + a, start + min(b, len(ids))), words_of(sentence)))
        at += size
      self._of.append(own)
      start += len(ids)
    held = Counter(w for own in self._of for _, words in own for w in words)
    count = max(1, sum(map(len, self._of)))
    self._rarity = {w: float(np.log(count / n)) for w, n in held.items()}

  def telling(self, parts: Sequence[int], answer: str
              ) -> tuple[tuple[int, int], ...]:
    """Token spans of the sentences with most of the answer's words.

    Those with at least `_NEAR` of the best one's, in rarity.
    """
    wanted = words_of(answer)
    scored = [(sum(self._rarity[w] for w in words & wanted), span)
              for i in parts for span, words in self._of[i]]
    top = max((score for score, _ in scored), default=0.0)
    return tuple(sorted(
      span for score, span in scored if top and score >= _NEAR * top))


def question_histories(documents: Sequence[tuple], tokenizer: Tokenizer,
                       seed: int) -> Iterator[History]:
  """Histories of several documents each, every question once.

  In every second one they are asked in a conversation behind the documents,
  where one question in two may lean on the one before it.
  """
  rng = np.random.default_rng([seed, 1])
  groups: list[list[tuple]] = [[]]
  for index in rng.permutation(len(documents)).tolist():
    if sum(len(ids) for ids, _ in groups[-1]) + len(
        documents[index][0]) > LENGTH * 1.15 and groups[-1]:
      groups.append([])
    groups[-1].append(documents[index])
  every = [q for _, asked in documents for q, *_ in asked]
  common = common_words(every)
  for group in groups:
    talk = Talk(np.concatenate([ids for ids, _ in group]), tokenizer, rng)
    own, at = {q for _, others in group for q, *_ in others}, 0
    for part, asked in group:
      last = ""
      for question, gold, best, answer in asked:
        gold, best = (tuple((a + at, b + at) for a, b in spans)
                      for spans in (gold, best))
        if rng.integers(_FOREIGN) == 0:
          question, gold, best = every[int(rng.integers(len(every)))], (), ()
          if question in own:
            continue
          answer = made_up.wrong_answer(rng)
        text = question
        if last and talk.goes_on and rng.integers(2):
          text = leaning(question, last, common, rng)
        talk.ask("questions", text, gold, answer, best)
        last = question
      at += len(part)
    yield talk.history()
