"""Histories and what is asked of them, with the answer known by construction.

  questions  natural questions about stories and meetings, with the sections or
             turns that answer them, and the sentences in these that share most
             words with the answer; one in seven is asked of other texts
  cloze      a sentence taken out of a text asks for the place it stood at, as
             does a heading or docstring for what stands below it
  facts      made-up facts, asked for in other words, one by one and several
             at once, among distractors, in plain text and in turns of a chat;
             some were asked before, or stand quoted elsewhere, and these words
             are no answer; prompts that ask for nothing
  reworded   everyday facts in plain text, asked for in other words throughout
  text       text that is read on: what stands far back is worth as much as it
             foretells of the next tokens

Every history is a function of (seed, number) alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import lzma
import re

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.training.common.data import TokenStore
from mcjax.training.lens import facts as made_up
from mcjax.training.lens import other_words
from mcjax.types import BRANCHING, McjaxError

LENGTH = 32768  # tokens of a history, about
_LONG = 2048  # tokens of a document by itself; shorter ones are joined
_FUTURE = 64  # tokens whose copies are counted while text is read on
_QUERY = 64  # newest tokens that act as the query there
_FOREIGN = 7  # one question in so many is asked of another history
_IDLE = ("Thanks!", "Thank you very much.", "Go on.", "Please continue.", "ok",
         "Hello!", "how nice", "Tell me a joke.", "Write a short poem.",
         "That was helpful.", "Danke!", "I see.", "Good morning.", "sure",
         "What do you think?", "haha", "No, that is wrong.", "Bye.")
_NEAR = 0.8  # of the best sentence's shared words that others must share
_SENTENCE = re.compile(r"(?<=[.!?\"\u201d])\s+")
_QUOTED = ('print(client.complete("{}"))', 'prompts = ["{}", "Thanks."]',
           'assert answers("{}") == expected', "Q: {}", "- {}", "# {}",
           '{{"role": "user", "content": "{}"}}', "Somebody asked: {}")
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


@dataclasses.dataclass(frozen=True)
class History:
  """Token ids [N] int32, and what is asked of them."""

  ids: np.ndarray
  examples: tuple[Example, ...]


def read_questions(path, split: str, tokenizer: Tokenizer) -> list[tuple]:
  """(ids, [(question, gold spans, best spans)]) of the documents of a split.

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
                    text.telling(found, answer)))
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
        own.append(((start + a, start + min(b, len(ids))), _words(sentence)))
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
    wanted = _words(answer)
    scored = [(sum(self._rarity[w] for w in words & wanted), span)
              for i in parts for span, words in self._of[i]]
    top = max((score for score, _ in scored), default=0.0)
    return tuple(sorted(
      span for score, span in scored if top and score >= _NEAR * top))


def _words(text: str) -> set[str]:
  return set(re.findall(r"\w+", text.casefold()))


def question_histories(documents: Sequence[tuple], tokenizer: Tokenizer,
                       seed: int) -> Iterator[History]:
  """Histories of several documents each, every question once."""
  rng = np.random.default_rng([seed, 1])
  groups: list[list[tuple]] = [[]]
  for index in rng.permutation(len(documents)).tolist():
    if sum(len(ids) for ids, _ in groups[-1]) + len(
        documents[index][0]) > LENGTH * 1.15 and groups[-1]:
      groups.append([])
    groups[-1].append(documents[index])
  every = [q for _, asked in documents for q, *_ in asked]
  for group in groups:
    ids = np.concatenate([ids for ids, _ in group])
    examples, at = [], 0
    own = {q for _, others in group for q, *_ in others}
    for part, asked in group:
      for question, gold, best in asked:
        gold, best = (tuple((a + at, b + at) for a, b in spans)
                      for spans in (gold, best))
        if rng.integers(_FOREIGN) == 0:
          question, gold, best = every[int(rng.integers(len(every)))], (), ()
          if question in own:
            continue
        examples.append(_asking("questions", question, gold, len(ids),
                                tokenizer, rng, best))
      at += len(part)
    yield History(ids, tuple(examples))


def _joined(questions: Sequence[str], rng: np.random.Generator) -> str:
  """One prompt that asks several questions."""
  link = str(rng.choice((" ", " And ", "\n", ", and ", " and ")))
  if "and" not in link:
    return link.join(questions)
  first, *others = (q.rstrip("?. ") for q in questions)
  return link.join([first, *(q[:1].lower() + q[1:] for q in others)]) + "?"


def _asking(kind: str, question: str, gold, cursor: int, tokenizer: Tokenizer,
            rng: np.random.Generator, best=()) -> Example:
  """An example of a prompt, in one of the ways people type."""
  return Example(kind, np.asarray(
    tokenizer.encode(_typed(question, rng)), np.int32), True, tuple(gold),
    cursor, np.zeros(0, np.int32), tuple(best))


def _typed(question: str, rng: np.random.Generator) -> str:
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


class TextHistories:
  """Histories out of stored text.

  Args:
    stores: {kind of text: TokenStore} of a split.
    tokenizer: of the base.
    seed: of everything drawn.
    length: tokens of a history.
    split: of the facts that are asked for in other words.

  Raises:
    McjaxError: there is no text.
  """

  def __init__(self, stores: Mapping[str, TokenStore], tokenizer: Tokenizer,
               seed: int = 0, length: int = LENGTH, split: str = "train"):
    self._stores, self._tokenizer = dict(stores), tokenizer
    self._reworded = other_words.facts(split)
    self._seed, self._length = seed, length
    self._long = self._documents(_LONG) or self._documents(1)
    self._kinds = sorted(self._long)
    if not self._kinds:
      raise McjaxError("no text to learn focus from")

  def _documents(self, shortest: int) -> dict[str, np.ndarray]:
    """Documents of so many tokens at least, of the kinds that have any."""
    found = {kind: np.flatnonzero(np.diff(store.offsets) >= shortest)
             for kind, store in self._stores.items()}
    return {kind: rows for kind, rows in found.items() if len(rows)}

  def cloze(self, number: int, count: int = 48) -> History:
    """Places that sentences, headings and docstrings were taken from."""
    rng = np.random.default_rng([self._seed, 2, number])
    parts, asked, at = [], [], 0
    while at < self._length:
      ids = self._document(rng, 8192)
      kept, gaps = self._without_some(ids, rng)
      asked += [(text, (a + at, b + at)) for text, (a, b) in gaps]
      parts.append(kept)
      at += len(kept)
    chosen = rng.permutation(len(asked))[:count]
    return History(np.concatenate(parts), tuple(
      _asking("cloze", asked[i][0], [asked[i][1]], at, self._tokenizer, rng)
      for i in chosen.tolist()))

  def facts(self, number: int, count: int = 24) -> History:
    """Made-up facts in text and in turns of a chat, and questions on them."""
    rng = np.random.default_rng([self._seed, 3, number])
    host = np.concatenate([self._document(rng, self._length // 3)
                           for _ in range(3)])
    drawn = [made_up.draw(rng) for _ in range(count)]
    cuts = np.sort(rng.integers(0, len(host), count))
    chat = self._tokenizer.has_chat_template and rng.integers(2) == 0
    parts, places, at, total = [], [], 0, 0
    for fact, cut in zip(drawn, cuts.tolist()):
      piece, told = self._told(fact, bool(chat), rng)
      parts += [host[at:cut], piece]
      total += cut - at
      places.append((total + told[0], total + told[1]))
      total, at = total + len(piece), cut
      if not chat and rng.integers(3) == 0:
        asked = _typed(drawn[int(rng.integers(count))].question, rng)
        line = "\n" + str(rng.choice(_QUOTED)).format(asked) + "\n"
        parts.append(self._tokenizer.encode(line))
        total += len(parts[-1])
    ids = np.concatenate([*parts, host[at:]]).astype(np.int32)
    examples = [
      _asking("facts", fact.question, [place], len(ids), self._tokenizer, rng)
      for fact, place in zip(drawn, places)]
    for _ in range(count // 4):
      some = rng.permutation(count)[: int(rng.integers(2, 5))].tolist()
      examples.append(_asking(
        "facts", _joined([drawn[i].question for i in some], rng),
        [places[i] for i in sorted(some)], len(ids), self._tokenizer, rng))
    for _ in range(count // 3):
      if rng.integers(2):
        examples.append(_asking("nothing", made_up.draw(rng).question, [],
                                len(ids), self._tokenizer, rng))
      else:
        idle = self._tokenizer.encode(str(rng.choice(_IDLE)))
        examples.append(Example("nothing", np.asarray(idle, np.int32), True,
                                (), len(ids), np.zeros(0, np.int32)))
    return History(ids, tuple(examples))

  def reworded(self, number: int, count: int = 24) -> History:
    """Everyday facts among text, and questions in other words."""
    rng = np.random.default_rng([self._seed, 5, number])
    host = np.concatenate([self._document(rng, self._length // 3)
                           for _ in range(3)])
    chosen = rng.permutation(len(self._reworded))[:count].tolist()
    cuts = np.sort(rng.integers(0, len(host), len(chosen))).tolist()
    parts, asked, at, total = [], [], 0, 0
    for cut, i in zip(cuts, chosen):
      fact, question = self._reworded[i]
      end = str(rng.choice(("\n", "", " ")))
      piece = self._tokenizer.encode(f" {fact}{end}")
      parts += [host[at:cut], piece]
      total += cut - at
      asked.append((question, (total, total + len(piece))))
      total, at = total + len(piece), cut
    ids = np.concatenate([*parts, host[at:]]).astype(np.int32)
    return History(ids, tuple(
      _asking("reworded", question, [place], len(ids), self._tokenizer, rng)
      for question, place in asked))

  def text(self, number: int, count: int = 24) -> History:
    """Text that is read on from several places."""
    rng = np.random.default_rng([self._seed, 4, number])
    ids = self._document(rng, 16384)
    if rng.integers(2):
      ids = np.concatenate([ids, self._document(rng, 8192), ids[-2048:],
                            self._document(rng, 4096)])
    first = len(ids) // 3 // BRANCHING
    last = (len(ids) - _FUTURE) // BRANCHING
    cursors = rng.permutation(np.arange(first, last))[:count] * BRANCHING
    return History(ids, tuple(
      Example("text", ids[c - _QUERY : c], False, (), c, ids[c : c + _FUTURE])
      for c in np.sort(cursors).tolist()))

  def _document(self, rng, longest: int) -> np.ndarray:
    """A part of a document; of several where all of them are short."""
    ids = self._part(rng, longest)
    while len(ids) < min(longest, _LONG):
      ids = np.concatenate([ids, self._part(rng, longest)])
    return ids[:longest]

  def _part(self, rng, longest: int) -> np.ndarray:
    kind = self._kinds[int(rng.integers(len(self._kinds)))]
    ids = self._stores[kind].document(int(rng.choice(self._long[kind])))
    start = int(rng.integers(0, max(1, len(ids) - longest)))
    return np.asarray(ids[start : start + longest], np.int32)

  def _without_some(self, ids: np.ndarray, rng) -> tuple[np.ndarray, list]:
    """A text without a few of its lines and sentences, and where they stood."""
    text = self._tokenizer.decode(ids)
    pieces = re.split(r"(?<=[.!?])\s+|(?<=\n)", text)
    pieces = [p for p in pieces if p]
    taken = {}
    for i in rng.permutation(np.arange(1, max(2, len(pieces) - 2))).tolist():
      words = len(pieces[i].split()) if i < len(pieces) else 0
      alone = not {i - 2, i - 1, i + 1, i + 2} & taken.keys()
      if 3 <= words <= 32 and alone and len(taken) < max(4, len(ids) // 256):
        taken[i] = pieces[i].strip(" \n#=-*\"'`")
    parts, gaps, total = [], [], 0
    for i, piece in enumerate(pieces):
      if i in taken and rng.integers(3):  # one in three stays where it is
        gaps.append((taken[i], (max(0, total - 32), total + 64)))
        continue
      encoded = self._tokenizer.encode(
        piece if piece.endswith("\n") else piece + " ")
      if i in taken:
        gaps.append((taken[i], (total, total + len(encoded))))
      parts.append(encoded)
      total += len(encoded)
    gaps = [(t, (a, min(b, total))) for t, (a, b) in gaps if a < total]
    return np.concatenate(parts).astype(np.int32), gaps

  def _told(self, fact: made_up.Fact, chat: bool, rng):
    """Ids of a fact as it is told, and the span of what tells it in them."""
    tokenizer = self._tokenizer
    lead = tokenizer.encode(f" {fact.lead}") if fact.lead else []
    if not chat:
      ids = np.concatenate([np.asarray(lead, np.int32),
                            tokenizer.encode(f" {fact.text}\n")])
      return ids.astype(np.int32), (len(lead), len(ids))
    messages = [{"role": "user", "content": f"{fact.lead} {fact.text}".strip()},
                {"role": "assistant", "content": made_up.reply(rng)}]
    if rng.integers(2):  # an earlier question about it, wrongly answered
      messages += [{"role": "user", "content": _typed(fact.question, rng)},
                   {"role": "assistant", "content": made_up.wrong_answer(rng)}]
    turn = tokenizer.chat(messages, first=False, add_generation_prompt=False)
    own = np.flatnonzero(turn.owner == 0)
    start = min(int(own[0]) + len(lead), int(own[-1]))
    return turn.ids, (start, int(own[-1]) + 1)
