"""Whether a prompt asks for something, and how surely text answers it.

A question is answered from the sentences that answer it and from nothing else,
which would distract a small model. "Go on." or "Thanks, that helped." are no
questions: sentences that hold their words are not what they are about.
"""

from __future__ import annotations

from collections.abc import Mapping
import re

import numpy as np

from mcjax.answer.passages import HOLDS, Passage
from mcjax.tree import lexical_rank
from mcjax.window.focus_view import FocusView

SURE, UNSURE = HOLDS, 0.15  # see `certainty`
_NAMED = 0.5  # certainty from which a prompt that asks nothing is on a sentence
_LONG = 8  # different tokens that it has at least

_REQUESTS = frozenset("tell give name list find quote recall".split())
_OPENINGS = frozenset((
  "who whom whose what when where which why how is are was were does did can "
  "could would should has").split())
_QUESTION_MARKS = "?\uff1f\u061f\u037e"  # also East Asian, Arabic, Greek
_SENTENCE = re.compile(r"[^.!\n]+[.!\n]?")
_WORD = re.compile(r"\w+")


def asks(prompt: str) -> bool:
  """Whether some sentence of a prompt is a question or asks to be told.

  A question mark says so in many languages. Without one a sentence asks if it
  begins as an English question does and is not closed as a statement ("who
  sails", but not "When I was young."), or with a word such as "tell", "please"
  aside.
  """
  if any(mark in prompt for mark in _QUESTION_MARKS):
    return True
  for sentence in _SENTENCE.findall(prompt):
    words = _WORD.findall(sentence.lower())
    if words[:1] == ["please"]:
      words = words[1:]
    if words and words[0] in _REQUESTS:
      return True
    if words and words[0] in _OPENINGS and sentence[-1] not in ".!":
      return True
  return False


def certainty(view: FocusView, answers: Mapping[int, Passage]) -> float:
  """Share of a prompt, in [0, 1], that its best sentence holds.

  The model's own words do not count. Of the prompt, words that no block holds
  count too: they are what is not found. From `SURE` on the sentence surely
  answers, below `UNSURE` it only happens to hold a word.

  Args:
    view: the policy's view of a prompt.
    answers: {block: its sentence} as found by words; may be empty.
  """
  best = max((p.share for p in answers.values() if not p.own), default=0.0)
  return best * lexical_rank.known_share(
    view.tree, view.query_ids, view.query_weights)


def reads_alone(view: FocusView, answers: Mapping[int, Passage]) -> bool:
  """Whether what answers a prompt may be read without the other raw text.

  A question's may, and what a prompt of some length repeats, such as "The code
  of the pump house is".
  """
  return view.question or (
    certainty(view, answers) >= _NAMED
    and len(np.unique(view.query_ids)) >= _LONG)
