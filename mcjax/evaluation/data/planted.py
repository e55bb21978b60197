"""Planted needs: made-up facts in real text, and plain questions about them.

The names are built from syllables, so no model can know them, and differ in
every draw. The templates belong to the evaluation: training must use others.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_ONSETS = "b br c d dr f g gl h k kr l m n p pr qu r s st t th tr v w z".split()
_VOWELS = "a e i o u ae ia io".split()
_CODAS = "n r l m x nd rk st th sk".split()
_COLOURS = "amber crimson ivory jade ochre teal violet scarlet".split()
_ANIMALS = "badger falcon lynx otter raven stag tortoise walrus".split()
_CITIES = ("Tampere Valparaiso Aarhus Izmir Quito Windhoek Nagoya "
           "Ljubljana").split()


@dataclasses.dataclass(frozen=True)
class Need:
  """One planted fact.

  Attributes:
    fact: the sentence that is planted.
    question: asks for it, shorter than one block.
    answer: what a right answer must contain.
  """

  fact: str
  question: str
  answer: str


def _name(rng: np.random.Generator) -> str:
  parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
  return ("".join(parts) + rng.choice(_CODAS)).capitalize()


def _number(rng):
  return str(rng.integers(1000, 10000))


def _creature(rng):
  return f"{rng.choice(_COLOURS)} {rng.choice(_ANIMALS)}"


def _city(rng):
  return str(rng.choice(_CITIES))


def _person(rng):
  return f"{_name(rng)} {_name(rng)}"


_TEMPLATES = (
  ("The entry code of the {name} depot is {value}.",
   "What is the entry code of the {name} depot?", _number),
  ("The emblem of the {name} guild is the {value}.",
   "What is the emblem of the {name} guild?", _creature),
  ("The {name} archive was moved to {value} last winter.",
   "Where was the {name} archive moved last winter?", _city),
  ("The inventor of the {name} engine is {value}.",
   "Who is the inventor of the {name} engine?", _person),
  ("The {name} gateway accepts connections on port {value}.",
   "On which port does the {name} gateway accept connections?", _number),
)


def draw(count: int, seed: int) -> list[Need]:
  """`count` needs, the templates in turn; a pure function of the seed."""
  rng = np.random.default_rng(seed)
  needs = []
  for i in range(count):
    fact, question, value = _TEMPLATES[i % len(_TEMPLATES)]
    name, answer = _name(rng), value(rng)
    needs.append(Need(
      fact.format(name=name, value=answer), question.format(name=name), answer
    ))
  return needs


def plant(token_ids: np.ndarray, facts: list[np.ndarray], seed: int
          ) -> tuple[np.ndarray, list[tuple[int, int]]]:
  """Inserts facts at random places, one in each of equal parts of the text.

  Args:
    token_ids: [N] int32 host text.
    facts: token ids of each fact, in order.
    seed: of the places.

  Returns:
    ids [N + sum of lengths] and the (start, stop) of every fact in them.
  """
  rng = np.random.default_rng(seed)
  edges = np.linspace(0, len(token_ids), len(facts) + 1).astype(int)
  pieces, places, at = [], [], 0
  for fact, low, high in zip(facts, edges[:-1], edges[1:]):
    cut = int(rng.integers(low, max(low + 1, high)))
    before = token_ids[low:cut]
    pieces += [before, fact, token_ids[cut:high]]
    start = at + len(before)
    places.append((start, start + len(fact)))
    at += (high - low) + len(fact)
  return np.concatenate(pieces).astype(np.int32), places
