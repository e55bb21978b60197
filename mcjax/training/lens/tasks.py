"""What LensNet learns from: real text to follow, and questions about it.

  follow   one long document, read on
  resume   read on where a rare pair of tokens comes back after a long absence:
           a definition used far away, a name after many pages
  return   a document, another one, and the first again
  ask      made-up facts in real text, and a question about one of them

The question templates are the training's own; the evaluation has others
(`evaluation/planted.py`), and its documents come from other sources.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import numpy as np

from mcjax.training.common.data import TokenStore
from mcjax.types import BRANCHING, McjaxError

KINDS = ("ask", "resume", "ask", "return", "ask", "follow")  # in turn
_ABSENT = 1024  # tokens for which a resumed pair was gone
_SHORTEST = 2048

_FIRST = ("Mor Tel Bran Kes Ul Fen Dar Ost Vel Quin Har Zan Lor Pem Wick "
          "Gor Ash Il Cor Bel").split()
_SECOND = ("wen ford ix amo dale ura eth oway ing ora ast elle ovic ana "
           "tor ustin evar ock illa ede").split()
_PLACES = ("Bergen Cusco Leuven Osaka Durban Malaga Tartu Hobart Ghent Salta "
           "Bristol Nantes").split()
_THINGS = ("silver compass, copper kettle, woollen banner, glass anchor, paper "
           "lantern, wooden flute, iron key, velvet drum, marble sphere, "
           "leather map").split(", ")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

_FACTS = (
  ("The password for {name} is {value}.",
   "What is the password for {name}?", "word"),
  ("{name} keeps a {value} in the hallway.",
   "What does {name} keep in the hallway?", "thing"),
  ("The meeting with {name} takes place on {value}.",
   "When does the meeting with {name} take place?", "day"),
  ("{name} grew up in {value}.", "Where did {name} grow up?", "place"),
  ("The locker of {name} has the number {value}.",
   "Which number has the locker of {name}?", "number"),
  ("The function {name} returns {value} when the file is missing.",
   "What does the function {name} return when the file is missing?", "number"),
  ("Nobody but {value} may open the {name} vault.",
   "Who may open the {name} vault?", "name"),
  ("The ship {name} sails under the flag of {value}.",
   "Under which flag does the ship {name} sail?", "place"),
  ("In the {name} project, the build server is called {value}.",
   "What is the build server called in the {name} project?", "word"),
  ("The village of {name} is famous for its {value}.",
   "What is the village of {name} famous for?", "thing"),
  ("Doctor {name} prescribed {value} drops a day.",
   "How many drops a day did doctor {name} prescribe?", "number"),
  ("The {name} comet was first seen from {value}.",
   "From where was the {name} comet first seen?", "place"),
)


@dataclasses.dataclass(frozen=True)
class Fact:
  """A made-up fact and a question about it."""

  text: str
  question: str


@dataclasses.dataclass(frozen=True)
class Task:
  """One history and what comes after it.

  Attributes:
    kind: ask, resume, return or follow.
    ids: [N] int32 the text.
    starts: cursors, multiples of 32, from which the text is followed; for
      "ask" the one at which the question is put.
    question: for "ask"; the answer continues it.
    answer: for "ask".
    place: (start, stop) of the asked fact in `ids`, or None.
  """

  kind: str
  ids: np.ndarray
  starts: tuple[int, ...]
  question: str = ""
  answer: str = ""
  place: tuple[int, int] | None = None


def _name(rng: np.random.Generator) -> str:
  return str(rng.choice(_FIRST)) + str(rng.choice(_SECOND))


def draw_fact(rng: np.random.Generator) -> Fact:
  """A made-up fact of a random template."""
  text, question, kind = _FACTS[int(rng.integers(len(_FACTS)))]
  name = _name(rng)
  if rng.random() < 0.5:
    name += " " + _name(rng)
  value = {
    "word": lambda: _name(rng).lower() + str(rng.integers(10, 100)),
    "thing": lambda: str(rng.choice(_THINGS)),
    "day": lambda: str(rng.choice(_DAYS)),
    "place": lambda: str(rng.choice(_PLACES)),
    "number": lambda: str(rng.integers(100, 100000)),
    "name": lambda: _name(rng),
  }[kind]()
  return Fact(text.format(name=name, value=value), question.format(name=name))


class TaskSource:
  """Tasks as a pure function of (seed, number).

  Args:
    stores: {kind of text: TokenStore} of the training split.
    tokenizer: of the base.
    longest: tokens of a history at most.
    seed: of everything drawn.

  Raises:
    McjaxError: no document is long enough.
  """

  def __init__(self, stores: Mapping[str, TokenStore], tokenizer,
               longest: int = 16384, seed: int = 0):
    self._stores, self._tokenizer = dict(stores), tokenizer
    self._longest, self._seed = longest, seed
    self._long = {
      kind: np.flatnonzero(np.diff(store.offsets) >= _SHORTEST)
      for kind, store in self._stores.items()
    }
    self._kinds = sorted(k for k, rows in self._long.items() if len(rows))
    if not self._kinds:
      raise McjaxError(f"no document of {_SHORTEST} tokens to learn focus from")

  def task(self, number: int) -> Task:
    """Task `number`; the kinds take turns."""
    rng = np.random.default_rng([self._seed, number])
    kind = KINDS[number % len(KINDS)]
    return getattr(self, f"_{kind}")(rng)

  def _document(self, rng, longest: int) -> np.ndarray:
    """A stretch of at most `longest` tokens of a random long document."""
    kind = self._kinds[int(rng.integers(len(self._kinds)))]
    row = int(rng.choice(self._long[kind]))
    ids = self._stores[kind].document(row)
    start = int(rng.integers(0, max(1, len(ids) - longest)))
    return ids[start : start + longest]

  def _length(self, rng) -> int:
    """Log-uniform between the shortest and the longest history."""
    low, high = np.log(_SHORTEST), np.log(self._longest)
    return int(np.exp(rng.uniform(low, high)))

  def _text(self, rng, length: int) -> np.ndarray:
    """Documents, one after another, `length` tokens in all."""
    pieces, size = [], 0
    while size < length:
      piece = self._document(rng, min(length - size, max(1024, length // 3)))
      pieces.append(piece)
      size += len(piece)
    return np.concatenate(pieces)

  def _follow(self, rng) -> Task:
    ids = self._document(rng, self._length(rng))
    low = len(ids) // 2 // BRANCHING
    start = int(rng.integers(low, len(ids) // BRANCHING - 16)) * BRANCHING
    return Task("follow", ids, (start,))

  def _resume(self, rng) -> Task:
    ids = self._document(rng, self._longest)
    places = resumed(ids)
    if not len(places):
      return self._follow(rng)
    picked = np.sort(rng.choice(places, min(2, len(places)), replace=False))
    return Task("resume", ids, tuple(int(p) for p in picked))

  def _return(self, rng) -> Task:
    first = self._document(rng, 3072)
    cut = len(first) // 2 // BRANCHING * BRANCHING
    between = self._text(rng, int(rng.integers(1024, 5 * 1024)))
    between = between[: len(between) // BRANCHING * BRANCHING]
    ids = np.concatenate([first[:cut], between, first[cut:]])
    back = cut + len(between)
    return Task("return", ids, (cut + 4 * BRANCHING, back + 2 * BRANCHING))

  def _ask(self, rng) -> Task:
    host = self._text(rng, self._length(rng))
    facts = [draw_fact(rng) for _ in range(max(2, len(host) // 1024))]
    pieces = [self._tokenizer.encode(f" {f.text}") for f in facts]
    cuts = np.sort(rng.integers(0, len(host), len(facts)))
    asked = int(rng.integers(len(facts)))
    parts, at, place = [], 0, None
    for i, (piece, cut) in enumerate(zip(pieces, cuts)):
      parts += [host[at:cut], piece]
      at = cut
      if i == asked:
        stop = sum(map(len, parts))
        place = (stop - len(piece), stop)
    ids = np.concatenate([*parts, host[at:]]).astype(np.int32)
    fact = facts[asked]
    return Task("ask", ids, (len(ids),), fact.question, fact.text, place)


def resumed(ids: np.ndarray) -> np.ndarray:
  """Cursors, multiples of 32, after which a rare pair comes back.

  A pair of adjacent tokens counts if it occurs at most four times, last more
  than 1,024 tokens ago.
  """
  pairs = ids[:-1].astype(np.int64) << 32 | ids[1:].astype(np.int64)
  order = np.argsort(pairs, kind="stable")
  same = pairs[order][1:] == pairs[order][:-1]
  gap = np.zeros(len(pairs), np.int64)
  gap[order[1:][same]] = (order[1:] - order[:-1])[same]
  _, inverse, counts = np.unique(
    pairs, return_inverse=True, return_counts=True)
  back = np.flatnonzero((gap > _ABSENT) & (counts[inverse] <= 4))
  # Two pairs that come back together make a phrase, not chance.
  phrase = back[:-1][np.diff(back) == 1]
  cursors = np.unique(phrase // BRANCHING * BRANCHING)
  room = len(ids) - 8 * BRANCHING
  return cursors[(cursors >= _SHORTEST // 2) & (cursors <= room)]
