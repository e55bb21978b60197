"""Prompts of a history: as people type them, alone or in a conversation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import dataclasses
import re

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.training.lens import facts as made_up

LENGTH = 32768  # tokens of a history, about
_COMMON = 0.02  # share of the questions, from which on a word names nothing
_LEADS = ("", "", "", "Please tell me: ", "I need to know ", "Remind me, ",
          "Do you remember ", "Can you say ", "Explain: ", "Quick question - ")


@dataclasses.dataclass(frozen=True)
class Example:
  """One query of a history.

  Attributes:
    kind: of the query.
    query: [Q] int32 token ids.
    asked: it is a prompt; else the newest tokens.
    gold: token spans that answer it; none where the history does not.
    best: token spans in these that the answer was taken from, if known.
    before: [B] int32 what the user said before it, if anything.
    cursor: tokens of the history that are there.
    future: [F] int32 what comes next, where it is known.
  """

  kind: str
  query: np.ndarray
  asked: bool
  gold: tuple[tuple[int, int], ...]
  cursor: int
  future: np.ndarray
  best: tuple[tuple[int, int], ...] = ()
  before: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class History:
  """Token ids [N] int32, and what is asked of them."""

  ids: np.ndarray
  examples: tuple[Example, ...]


def words_of(text: str) -> set[str]:
  return set(re.findall(r"\w+", text.casefold()))


def typed(question: str, rng: np.random.Generator) -> str:
  """A question in one of the ways people type."""
  text = str(rng.choice(_LEADS))
  text += question if not text else question[:1].lower() + question[1:]
  way = rng.integers(8)
  if way == 0:
    text = text.lower()
  elif way == 1:
    text = text.rstrip("?.! ")
  elif way == 2:
    text = text.lower().rstrip("?.! ")
  elif way == 3 and rng.integers(3) == 0:
    text = text.upper()
  return text


def common_words(questions: Sequence[str]) -> set[str]:
  """Words of too many of the questions to name what one is about."""
  held = Counter(w for question in questions for w in words_of(question))
  return {w for w, n in held.items() if n > _COMMON * len(questions)}


def leaning(question: str, last: str, common: set[str],
             rng: np.random.Generator) -> str:
  """A question with a pronoun for what the last one has named already.

  That is the longest run of words of both with one that is not common, and at
  most one common word ("the") before that. As it is where there is none.
  """
  found = list(re.finditer(r"\w+", question))
  words = [match.group().casefold() for match in found]
  said = " ".join(["", *re.findall(r"\w+", last.casefold()), ""])
  longest, place = 0, (0, 0)
  for i in range(len(words)):
    for j in range(i + 1, len(words) + 1):
      run = words[i:j]
      rare = [k for k, word in enumerate(run) if word not in common]
      if (" ".join(["", *run, ""]) in said and rare and rare[0] <= 1
          and rare[-1] == len(run) - 1 and len(run) > longest):
        longest, place = len(run), (found[i].start(), found[j - 1].end())
  if not longest:
    return question
  return f"{question[: place[0]]}{made_up.pronoun(rng)}{question[place[1] :]}"


class Talk:
  """Prompts behind a text: each by itself, or all in one conversation.

  Attributes:
    goes_on: they make a conversation.
  """

  def __init__(self, ids: np.ndarray, tokenizer: Tokenizer,
               rng: np.random.Generator):
    self._parts, self._total = [ids], len(ids)
    self._tokenizer, self._rng = tokenizer, rng
    self._examples: list[Example] = []
    self._before: np.ndarray | None = None
    self.goes_on = bool(tokenizer.has_chat_template and rng.integers(2))

  def ask(self, kind: str, text: str, gold, reply: str, best=(),
          as_it_is: bool = False) -> None:
    """Adds a prompt, in one of the ways people type unless `as_it_is`.

    Args:
      kind: of the example.
      text: of the prompt.
      gold, best: as of `Example`.
      reply: what a model says to it.
      as_it_is: the text is typed so.
    """
    text = text if as_it_is else typed(text, self._rng)
    query = np.asarray(self._tokenizer.encode(text), np.int32)
    self._examples.append(Example(
      kind, query, True, tuple(gold), self._total, np.zeros(0, np.int32),
      tuple(best), self._before))
    if self.goes_on:
      turn = self._tokenizer.chat(
        [{"role": "user", "content": text},
         {"role": "assistant", "content": reply}], first=False,
        add_generation_prompt=False)
      self._parts.append(turn.ids)
      self._total, self._before = self._total + len(turn.ids), query

  def history(self) -> History:
    """The text, the conversation if there is one, and the prompts."""
    return History(np.concatenate(self._parts).astype(np.int32),
                   tuple(self._examples))
