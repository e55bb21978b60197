"""Made-up names, of so many spellings that none is learned by heart."""

from __future__ import annotations

import uuid

import numpy as np

_FIRST = (
  "Mor Tel Bran Kes Ul Fen Dar Ost Vel Quin Har Zan Lor Pem Wick Gor Ash Il "
  "Cor Bel Anna Ben Clara Devi Emil Farah Goran Hana").split()
_SECOND = ("wen ford ix amo dale ura eth oway ing ora ast elle ovic ana "
           "tor ustin evar ock illa ede").split()
# Of names that are spelled by chance, and of those that are two plain words.
_ONSETS = ["", *("b c ch d f g gr h j k kn l m n p ph pl r s sc sh sl sp t tw "
                 "v w x y z").split()]
_NUCLEI = "a e i o u a e i o u ai au ea ei ie oo ou ua y".split()
_CODAS = [*[""] * 20, *("b ck d ff g l ll m mp n ng ns nt p r rn s ss t tz x "
                       "z").split()]
_PLAIN = ("North South Upper Lower Old New Grand Silver Iron Stone Winter "
          "Summer Harbour Garden River Forest Mill Bridge Castle Valley "
          "Lantern Orchard Meadow Market Granite Copper Sunset Morning Harvest "
          "Island").split()
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def name(rng: np.random.Generator) -> str:
  """One of so many that two facts of a history seldom share a word of it."""
  way = rng.integers(8)
  if way == 0:
    return " ".join(two_words(rng))
  if way == 1:
    return code(rng)
  made = spelled(rng) if way > 2 else syllables(rng)
  return made if rng.random() < 0.6 else f"{made} {name(rng)}"


def syllables(rng: np.random.Generator) -> str:
  """A name of two syllables out of short lists."""
  return str(rng.choice(_FIRST)) + str(rng.choice(_SECOND))


def spelled(rng: np.random.Generator) -> str:
  """A name of two or three syllables that no list holds."""
  return "".join(
    str(rng.choice(part)) for _ in range(int(rng.integers(2, 4)))
    for part in (_ONSETS, _NUCLEI, _CODAS)).capitalize()


def two_words(rng: np.random.Generator) -> tuple[str, str]:
  """Two plain words that make a name."""
  first, second = rng.permutation(_PLAIN)[:2].tolist()
  return first, second


def code(rng: np.random.Generator) -> str:
  """Letters and a number."""
  letters = "".join(rng.choice(list(_LETTERS), int(rng.integers(1, 4))))
  return letters + str(rng.choice(("", "-", " "))) + str(rng.integers(2, 1000))


def unique_id(rng: np.random.Generator) -> str:
  """A random UUID."""
  return str(uuid.UUID(bytes=rng.bytes(16), version=4))
