"""Entries of one form that differ in key and value alone, looked up by key.

A table, a configuration, a directory: hundreds of lines with the same words,
of which one is right. The wordings are the training's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mcjax.training.lens import names

FEWEST, MOST = 32, 400  # entries of a list
_TWICE = 0.2  # of the keys have several entries

_KEYS: Mapping[str, Callable[[np.random.Generator], str]] = {
  "name": names.name,
  "spelled": names.spelled,
  "joined": lambda rng: "-".join(names.two_words(rng)).lower(),
  "variable": lambda rng: "_".join(
    [*names.two_words(rng), str(rng.integers(1, 100))]).lower(),
  "code": names.code,
  "id": names.unique_id,
  "number": lambda rng: str(int(10 ** rng.uniform(3, 10))),
}
_ALIKE = ("joined", "id") * 2  # keys that share most of their parts with others
_VALUES: Mapping[str, Callable[[np.random.Generator], str]] = {
  "number": lambda rng: str(rng.integers(10, 10 ** int(rng.integers(3, 9)))),
  "word": lambda rng: names.syllables(rng).lower(),
  "name": names.name,
  "id": names.unique_id,
  "price": lambda rng: f"{rng.integers(1, 900)}.{rng.integers(10, 100)}",
  "time": lambda rng: f"{rng.integers(0, 24):02}:{rng.integers(0, 60):02}",
}
# (how every entry is written, how one is looked up)
_FORMS = (
  (("{key}: {value}", "{key} = {value}", "{key},{value}", "| {key} | {value} |",
    '  "{key}": "{value}",', "{key} -> {value}", "- {key} ({value})",
    'set {key} "{value}"', "<{key}>{value}</{key}>"),
   ("What is the value of {key}?", "Which value has {key}?", "{key}?",
    "Look up {key}.", "What does the list say for {key}?",
    "What is set for {key}?", "What stands beside {key}?")),
  (("The extension of {key} is {value}.", "Dial {value} to reach {key}."),
   ("How do I reach {key}?", "Which extension has {key}?",
    "What is the extension of {key}?", "Which number do I dial for {key}?")),
  (("One crate for {key} went to dock {value}.",
    "Dock {value} takes what comes for {key}."),
   ("Where did the crate for {key} go?", "Which dock has things for {key}?",
    "What are all the docks for {key}?")),
  (("Remember that the seal of {key} carries the sign {value}.",
    "{value} is the sign on the seal of {key}."),
   ("Which sign is on the seal of {key}?", "What does the seal of {key} carry?",
    "What are the signs of {key} that you were told of?")),
  (("Entry: {key}. Amount due: {value}.", "{key} owes {value}.",
    "Paid to {key}: {value}"),
   ("How much is it for {key}?", "What is the amount of {key}?",
    "What does the entry of {key} say?")),
  (("Train {key} leaves at {value}.", "{value} departure of {key}"),
   ("When does {key} leave?", "What time is the departure of {key}?")),
  (("[info] worker {key} finished with status {value}",
    "worker={key} status={value}"),
   ("What was the status of worker {key}?", "How did worker {key} finish?",
    "status of {key}?")),
)


class Listed(NamedTuple):
  """A list, and how its keys are looked up.

  Attributes:
    entries: (key, the line that tells its value).
    lookups: how one or several keys, for `{key}`, are asked for.
    missing: keys of the same kind that have no entry.
  """

  entries: list[tuple[str, str]]
  lookups: tuple[str, ...]
  missing: list[str]

  def question(self, keys: list[str], rng: np.random.Generator) -> str:
    """Asks for these keys."""
    *others, last = keys
    joined = f"{', '.join(others)} and {last}" if others else last
    return str(rng.choice(self.lookups)).format(key=joined)


def draw(rng: np.random.Generator, missing: int = 8) -> Listed:
  """A list of `FEWEST` to `MOST` entries."""
  told, lookups = _FORMS[int(rng.integers(len(_FORMS)))]
  form = str(rng.choice(told))
  key = _KEYS[str(rng.choice([*_KEYS, *_ALIKE]))]
  value = _VALUES[str(rng.choice(list(_VALUES)))]
  count = int(rng.integers(FEWEST, MOST + 1))
  keys = list(dict.fromkeys(key(rng) for _ in range(count + missing)))
  keys, absent = keys[:-missing], keys[-missing:]
  several = rng.integers(2)  # in every second list some keys come again
  entries = []
  for k in keys[:count]:
    times = int(rng.integers(2, 5)) if (
      several and rng.random() < _TWICE) else 1
    entries += [(k, form.format(key=k, value=value(rng)))
                for _ in range(times)]
  order = rng.permutation(len(entries))[:count].tolist()
  return Listed([entries[i] for i in order], lookups, absent)
