"""How an answer is scored: as SQuAD does, and whether it declines.

Normalisation and token F1 are those of Rajpurkar et al. (2016).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT = (r"(?:do|does|did) not|don't|doesn't|didn't|cannot|can't|could not|"
        r"couldn't|unable to|no way to")
_TELL = (r"know|say|tell|mention|state|specify|provide|contain|answer|find|"
         r"give|determine|explicitly|have (?:any |enough )?information")
_TOLD = (r"mention(?:ed)?|stated|specified|given|provided|told|known|said|"
         r"clear|found|available")
_DECLINES = re.compile(
  rf"\b(?:{_NOT}) (?:{_TELL})\b|"
  rf"\b(?:not|never|isn't|wasn't) (?:explicitly |directly |clearly )?"
  rf"(?:{_TOLD})\b|\bunknown\b|\bunanswerable\b|"
  r"\bno (?:answer|information|mention)\b", re.IGNORECASE)


def normalised(text: str) -> list[str]:
  """Words in lower case, without punctuation and articles."""
  lower = "".join(c for c in text.lower() if c not in string.punctuation)
  return _ARTICLES.sub(" ", lower).split()


def holds(text: str, answers: Sequence[str]) -> bool:
  """Whether a text contains the words of one of the answers in a row."""
  words = " ".join(["", *normalised(text), ""])
  wanted = [" ".join(["", *normalised(a), ""]) for a in answers]
  return any(w.strip() and w in words for w in wanted)


def token_f1(text: str, answers: Sequence[str]) -> float:
  """The best harmonic mean of precision and recall of words, in [0, 1]."""
  return max((_f1(normalised(text), normalised(a)) for a in answers),
             default=0.0)


def _f1(said: list[str], wanted: list[str]) -> float:
  both = sum((Counter(said) & Counter(wanted)).values())
  if not both:
    return float(said == wanted)
  return 2 * both / (len(said) + len(wanted))


def declines(text: str) -> bool:
  """Whether an answer says that it is not known."""
  return bool(_DECLINES.search(text)) or not normalised(text)
