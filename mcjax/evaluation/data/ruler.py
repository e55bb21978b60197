"""RULER's 13 tasks (Hsieh et al. 2024), to the published definitions.

The functions below draw in the order of the published generators, package
nvidia-long-context-eval: with the same seed and the same size they give the
same samples. Two things differ: sentences of the essays are cut by a rule, not
by NLTK's trained splitter, and essays are repeated where a length needs more.
What stands before the question is the history; the question is asked in a turn
of its own, without the published answer prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import random
import re
import string
from typing import Any, NamedTuple
import uuid

import numpy as np

from mcjax.evaluation.data import ruler_sources
from mcjax.types import McjaxError

SEED = 42  # the published one

_NOISE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
          "There and back again.")
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_NIAH = (
  "Some special magic {kind} are hidden within the following text. Make sure "
  "to memorize it. I will quiz you about the {kind} afterwards.\n{context}\n"
  "What are all the special magic {kind} for {query} mentioned in the provided "
  "text?")
_TRACKING = (
  "Memorize and track the chain(s) of variable assignment hidden in the "
  "following text.\n\n{context}\nQuestion: Find all variables that are "
  "assigned the value {query} in the text above.")
_TRACKED = (
  " Answer: According to the chain(s) of variable assignment in the text "
  "above, {count} variables are assgined the value {query}, they are: ")
_COMMON = (
  "Below is a numbered list of words. In these words, some appear more often "
  "than others. Memorize the ones that appear most often.\n{context}\n"
  "Question: What are the 10 most common words in the above list?")
_COMMON_PREFIX = (
  " Answer: The top 10 words that appear most often in the list are:")
_FREQUENT = (
  "Read the following coded text and track the frequency of each coded word. "
  "Find the three most frequently appeared coded words. {context}\nQuestion: "
  "Do not provide any explanation. Please ignore the dots '....'. What are the "
  "three most frequently appeared words in the above coded text?")
_ORDER = ("Answer the question based on the given documents. Only give me the "
          "answer and do not output any other words.")
_QA = (f"{_ORDER}\n\nThe following are given documents.\n\n{{context}}\n\n"
       f"{_ORDER}\n\nQuestion: {{query}}")

_HAYSTACKS = {  # task: haystack, key kind, value kind, keys, values, queries
  "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
  "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
  "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
  "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
  "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
  "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
  "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
  "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
}
NEEDLES = tuple(_HAYSTACKS)  # tasks whose answers are told one by one
TASKS = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")
ANSWER_TOKENS = {**dict.fromkeys(_HAYSTACKS, 128), "vt": 30, "cwe": 120,
                 "fwe": 50, "qa_1": 32, "qa_2": 32}


class Sample(NamedTuple):
  """One item.

  Attributes:
    context: the history, with the task's words before it.
    question: asked behind it.
    answers: what is looked for.
    evidence: spans (start, stop) of characters of the context that hold the
      answer; none where it is spread over all of it.
  """

  context: str
  question: str
  answers: tuple[str, ...]
  evidence: tuple[tuple[int, int], ...] = ()

  def told(self) -> list[str]:
    """The text of the evidence."""
    return [self.context[a:b] for a, b in self.evidence]


class Draws:
  """The two random sources of the published generators.

  Attributes:
    python, numpy: seeded alike.
    seed: of these, and of shuffles that are the same for every sample.
  """

  def __init__(self, seed: int = SEED):
    self.seed = seed
    self.python = random.Random(seed)
    self.numpy = np.random.RandomState(seed)

  def shuffle(self, items: list) -> None:
    random.Random(self.seed).shuffle(items)


def score(task: str, text: str, answers: Sequence[str]) -> float:
  """RULER's string match: any answer for the QA tasks, else the share."""
  found = [a.lower() in text.lower() for a in answers]
  return float(max(found)) if task.startswith("qa") else sum(found) / len(found)


def samples(task: str, length: int, count: int, measure: Callable[[str], int],
            seed: int = SEED) -> list[Sample]:
  """Samples whose prompt takes about `length` tokens with its answer.

  Args:
    task: one of TASKS.
    length: tokens of context, question and answer, at most.
    count: samples.
    measure: tokens of a text.
    seed: of the draws.

  Raises:
    McjaxError: no such task, or no sample is that short.
  """
  if task not in TASKS:
    raise McjaxError(f"no RULER task {task!r}; known: {', '.join(TASKS)}")
  make, step, largest = _generator(task, length)

  def fits(size: int) -> bool:
    sample = make(Draws(seed), size, 0)
    room = length - ANSWER_TOKENS[task]
    return measure(f"{sample.context}\n{sample.question}") <= room

  size = _largest(fits, step, largest)
  draws = Draws(seed)
  return [make(draws, size, number) for number in range(count)]


def _largest(fits: Callable[[int], bool], step: int, largest: int) -> int:
  """The largest multiple of step that fits, found by doubling and halving."""
  if not fits(step):
    raise McjaxError("RULER: this length is too short for its task")
  low, high = 1, 2
  while high * step <= largest and fits(high * step):
    low, high = high, 2 * high
  high = min(high, largest // step + 1)
  while high - low > max(1, low // 32):  # within 3 %
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle * step) else (low, middle)
  return low * step


def _generator(task: str, length: int
               ) -> tuple[Callable[[Draws, int, int], Sample], int, int]:
  """A function of draws, size and number; the step of sizes; the largest."""
  unlimited = 1 << 40
  if task in _HAYSTACKS:
    step = 500 if _HAYSTACKS[task][0] == "essay" else 25
    step = 5 if length < 4096 and step == 25 else step
    return functools.partial(_needles, task), step, unlimited
  if task == "vt":
    return lambda draws, size, _: tracking(draws, size), 10, unlimited
  if task == "cwe":
    words = len(ruler_sources.vocabulary(SEED))
    return (lambda draws, size, _: common_words(draws, size, length), 10, words)
  if task == "fwe":
    return (lambda draws, size, _: frequent_words(draws, size, length // 50),
            max(10, length // 64), unlimited)
  source = ruler_sources.squad if task == "qa_1" else ruler_sources.hotpot
  qas, docs = source()
  return (lambda draws, size, number: documents(draws, size, number, qas, docs),
          10, len(docs))


def _asked(template: str, context: str, answers, evidence=(), **values: Any
           ) -> Sample:
  before, after = template.split("{context}")
  whole = before.format(**values) + context
  return Sample(whole, after.format(**values).strip(), tuple(answers),
                located(whole, evidence))


def located(context: str, texts: Sequence[str], start: int = 0
            ) -> tuple[tuple[int, int], ...]:
  """Where texts stand first in a context, from `start` on."""
  places = [context.index(text, start) for text in texts]
  return tuple((a, a + len(text)) for a, text in zip(places, texts))


# --- needles -----------------------------------------------------------------


def _needles(task: str, draws: Draws, size: int, number: int) -> Sample:
  del number
  return needles(draws, size, *_HAYSTACKS[task])


def needles(draws: Draws, size: int, haystack: str, key_kind: str,
            value_kind: str, n_keys: int, n_values: int, n_queries: int,
            words: Sequence[str] | None = None) -> Sample:
  """Sentences that give numbers to keys, hidden in other text.

  Args:
    draws: advanced.
    size: words of essays, repeats or other needles.
    haystack: repeat, essay or needle.
    key_kind, value_kind: words, numbers or uuids.
    n_keys, n_values, n_queries: keys, values of each, keys asked for.
    words: of the essays; the published ones by default.
  """
  rng = draws.python
  keys, values, facts = [], [], []
  for _ in range(max(n_keys, n_queries)):
    keys.append(_random(rng, key_kind))
    values.append([])
    for _ in range(n_values):
      values[-1].append(_random(rng, value_kind))
      facts.append(_NEEDLE.format(
        kind=value_kind, key=keys[-1], value=values[-1][-1]))
  told = list(facts)
  draws.shuffle(facts)
  if haystack == "essay":
    context = _in_essays(
      rng, size, facts, words or ruler_sources.essay_words(size))
  else:
    context = _in_lines(rng, size, facts, haystack, key_kind, value_kind)
  chosen = rng.sample(range(len(keys)), n_queries)
  queries = [keys[i] for i in chosen]
  query = ", ".join(queries[:-1]) + ", and " + queries[-1]
  template, kind = _NIAH, value_kind
  if n_queries == 1:
    query = queries[0]
  if n_queries * n_values == 1:
    for many, one in (("Some", "A"), ("are all", "is"), ("are", "is"),
                      ("answers", "answer")):
      template = template.replace(many, one)
    kind = kind[:-1]
  wanted = [told[i * n_values + v] for i in chosen for v in range(n_values)]
  return _asked(template, context, [v for i in chosen for v in values[i]],
                wanted, kind=kind, query=query)


def _random(rng: random.Random, kind: str) -> str:
  if kind == "numbers":
    return str(rng.randint(10**6, 10**7 - 1))
  if kind == "words":
    return rng.choice(ruler_sources.pairs())
  return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _in_essays(rng: random.Random, size: int, facts: list[str],
               words: Sequence[str]) -> str:
  text = sentences(" ".join(words[:size]).strip())
  depths = np.round(np.linspace(0, 100, num=40)).astype(int).tolist()
  places = sorted(int(len(text) * (depth / 100))
                  for depth in rng.sample(depths, len(facts)))
  edges = [0, *places, len(text)]
  parts = []
  for i, (a, b) in enumerate(zip(edges[:-1], edges[1:])):
    parts += [" ".join(text[a:b]), *facts[i : i + 1]]
  return " ".join(parts)


def _in_lines(rng: random.Random, size: int, facts: list[str], haystack: str,
              key_kind: str, value_kind: str) -> str:
  if haystack == "repeat":
    lines = [_NOISE] * size
  else:
    lines = [_NEEDLE.format(kind=value_kind, key=_random(rng, key_kind),
                            value=_random(rng, value_kind))
             for _ in range(size)]
  places = sorted(rng.sample(range(size), len(facts)), reverse=True)
  for place, fact in zip(places, facts):
    lines.insert(place, fact)
  return "\n".join(lines)


def sentences(text: str) -> list[str]:
  """Sentences of a text, the blank between them left out."""
  return re.split(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])", text) if text else []


# --- variable tracking -------------------------------------------------------


def tracking(draws: Draws, size: int, hops: int = 4, example: int = 10
             ) -> Sample:
  """A chain of assignments among noise, behind a solved example.

  Args:
    draws: advanced.
    size: repeats of the noise.
    hops: of the chain.
    example: repeats of the noise in the example; 0 leaves it out.
  """
  solved = ""
  if example:  # drawn anew for every sample, as its names are
    shown, names, value = _chain(Draws(draws.seed), example, hops, 3)
    solved = (_TRACKING + _TRACKED).format(
      context=shown, query=value, count=hops + 1)
    solved += " " + " ".join(names) + "\n\n"
    for name in names:
      new = "".join(draws.python.choices(string.ascii_uppercase, k=len(name)))
      solved = solved.replace(name, new)
    solved = f" {solved}\n\n"
  context, names, value = _chain(draws, size, hops, 5)
  chain = [f"VAR {names[0]} = {value}", *(
    f"VAR {b} = VAR {a}" for a, b in zip(names[:-1], names[1:]))]
  found = _asked(_TRACKING, context, names, query=value)
  whole = solved + found.context
  return found._replace(
    context=whole, evidence=located(whole, chain, len(solved)))


def _chain(draws: Draws, size: int, hops: int, width: int
           ) -> tuple[str, list[str], str]:
  """Text with a chain, its variables, and their value."""
  rng = draws.python
  def name() -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=width))
  names = [name() for _ in range(hops + 1)]
  while len(set(names)) < hops + 1:
    names.append(name())
  names = names[: hops + 1]
  value = str(draws.numpy.randint(10000, 99999))
  chain = [f"VAR {names[0]} = {value}", *(
    f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(hops))]
  lines = [_NOISE + "\n"] * size
  if len(lines) <= len(chain):
    lines = [part + "." if part.strip() else part
             for line in lines for part in line.split(".")]
  places = sorted(rng.sample(range(len(lines)), len(chain)))
  for number, place in enumerate(places):
    lines.insert(place + number, chain[number])
  return " ".join(lines).replace(". \n", ".\n"), names, value


# --- counting words ----------------------------------------------------------


def common_words(draws: Draws, size: int, length: int = 1 << 20) -> Sample:
  """Ten words that stand in a list more often than the others.

  Args:
    draws: advanced.
    size: different words.
    length: of the sample; short ones repeat less, as published.
  """
  short = length < 4096
  shown, solution = _word_list(draws, *((20, 3, 1) if short else (40, 10, 3)))
  context, answers = _word_list(draws, size, *((6, 1) if short else (30, 3)))
  solved = _COMMON.format(context=shown) + _COMMON_PREFIX + _numbered(solution)
  found = _asked(_COMMON, context, answers)
  return found._replace(context=f"{solved}\n{found.context}")


def _word_list(draws: Draws, size: int, often: int, seldom: int
               ) -> tuple[str, list[str]]:
  drawn = draws.python.sample(ruler_sources.vocabulary(draws.seed), size)
  words = drawn[:10] * often + drawn[10:] * seldom
  draws.shuffle(words)
  return _numbered(words), drawn[:10]


def _numbered(words: Sequence[str]) -> str:
  return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def frequent_words(draws: Draws, size: int, vocabulary: int,
                   alpha: float = 2.0) -> Sample:
  """Made-up words whose counts fall with a power of their rank.

  Args:
    draws: advanced.
    size: words in all, about.
    vocabulary: different words.
    alpha: of the zeta distribution.
  """
  from scipy.special import zeta

  rng = draws.python
  def word():
    return "".join(rng.choices(string.ascii_lowercase, k=6))
  words = [word() for _ in range(vocabulary)]
  while len(set(words)) < vocabulary:
    words.append(word())
  words = sorted(set(words))
  draws.shuffle(words)
  words[0] = "..."
  rank = np.arange(1, len(words) + 1)
  counts = (size * rank**-alpha / zeta(alpha)).astype(int)
  text = [w for w, count in zip(words, counts) for _ in range(count)]
  draws.shuffle(text)
  return _asked(_FREQUENT, " ".join(text), words[1:4])


# --- questions on documents --------------------------------------------------


def documents(draws: Draws, size: int, number: int,
              qas: Sequence[ruler_sources.Asked], docs: Sequence[str]
              ) -> Sample:
  """Question `number` behind `size` documents."""
  asked = qas[number]
  own, more = list(asked.context), list(asked.more)
  if size >= len(docs):
    chosen = list(docs)
  else:
    if size - len(own) > len(more):
      known = set(own + more)
      rest = [i for i in range(len(docs)) if i not in known]
      more += draws.python.sample(rest, max(0, size - len(own) - len(more)))
    else:
      more = draws.python.sample(more, size - len(own))
    chosen = [docs[i] for i in own + more]
  draws.shuffle(chosen)
  context = "\n\n".join(
    f"Document {i + 1}:\n{text}" for i, text in enumerate(chosen))
  return _asked(_QA, context, asked.answers,
                [docs[i] for i in asked.evidence], query=asked.query)
