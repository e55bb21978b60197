"""Histories made of text, and prompts whose answer is known by construction.

  cloze      a sentence taken out of a text asks for the place it stood at, one
             that is quoted for the place where it stands; a heading, docstring
             or comment for what stands below it
  code       names that code defines and uses far away ask for the definition
  facts      made-up facts, asked for in other words, one by one and several
             at once, among distractors, in plain text and in turns of a chat;
             some were asked before, or stand quoted elsewhere, or were told
             otherwise before they changed, and these words are no answer;
             prompts that ask for nothing
  reworded   everyday facts in plain text, asked for in other words throughout
  listed     hundreds of entries of one form, looked up by key, one or several,
             together in a text, scattered over it, or with no text around
  (of these, too, some prompts are asked of other texts, in the same words, or
  are natural questions about stories and meetings, or about the world: nothing
  answers them)
  text       text that is read on, some with another one in between: what a
             block is worth is measured (`effects.py`)

Every history is a function of (seed, number) alone. Natural questions about
stories and meetings are in `questions.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
import itertools
import re

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.training.common.data import TokenStore
from mcjax.training.lens import facts as made_up
from mcjax.training.lens import lists, other_words, world
from mcjax.training.lens.prompts import (
  LENGTH,
  Example,
  History,
  Talk,
  typed,
  words_of,
)
from mcjax.types import BRANCHING, McjaxError

_ENDS = ("\n", "", " ")  # of what is told between other text
_REPEATS = 4  # in one history of so many questions were asked before, in vain
_FEW = 5  # sorts of facts in every second history of these
_LONG = 2048  # tokens of a document by itself; shorter ones are joined
_TEXT = 12288  # tokens of a text that is read on
_SPACING = 128  # tokens between the places where it is
_FUTURE = 64  # next tokens by which blocks are valued there
_QUERY = 64  # newest tokens that act as the query there
_OTHERS = 4  # one prompt in so many about text is asked of other text
_IDLE = ("Thanks!", "Thank you very much.", "Go on.", "Please continue.", "ok",
         "Hello!", "how nice", "Tell me a joke.", "Write a short poem.",
         "That was helpful.", "Danke!", "I see.", "Good morning.", "sure",
         "What do you think?", "haha", "No, that is wrong.", "Bye.")
_TITLE = re.compile(r'\s*(#|"""|/\*\*|//|=+ \w)')  # of what stands below
_QUOTES = ('"{}"', 'Where does it say "{}"?', 'What comes after "{}"?',
           "Which passage is this from: {}", 'who wrote "{}"',
           "Go on from here: {}", 'In welchem Text steht "{}"?')
_BELOW = 96  # tokens below a title that it tells about
_DEFINES = re.compile(
  r"(?m)^\s*(?:def|class|function|struct|interface|fn|func)\s+(\w{3,})")
_LOOKUPS = ("What does {} do?", "Where is {} defined?", "how does {} work",
            "Explain {}.", "Show me the code of {}.", "What are the arguments "
            "of {}?", "what happens in {}", "Was macht {}?")
_QUOTED = ('print(client.complete("{}"))', 'prompts = ["{}", "Thanks."]',
           'assert answers("{}") == expected', "Q: {}", "- {}", "# {}",
           '{{"role": "user", "content": "{}"}}', "Somebody asked: {}")


def _joined(questions: Sequence[str], rng: np.random.Generator) -> str:
  """One prompt that asks several questions."""
  link = str(rng.choice((" ", " And ", "\n", ", and ", " and ")))
  if "and" not in link:
    return link.join(questions)
  first, *others = (q.rstrip("?. ") for q in questions)
  return link.join([first, *(q[:1].lower() + q[1:] for q in others)]) + "?"


class TextHistories:
  """Histories out of stored text.

  Args:
    stores: {kind of text: TokenStore} of a split.
    tokenizer: of the base.
    seed: of everything drawn.
    length: tokens of a history.
    split: of the facts that are asked for in other words.
    strangers: questions that no text of these answers.

  Raises:
    McjaxError: there is no text.
  """

  def __init__(self, stores: Mapping[str, TokenStore], tokenizer: Tokenizer,
               seed: int = 0, length: int = LENGTH, split: str = "train",
               strangers: Sequence[str] = ()):
    self._stores, self._tokenizer = dict(stores), tokenizer
    self._strangers = tuple(strangers)
    self._reworded = other_words.facts(split)
    self._seed, self._length = seed, length
    self._long = self._documents(_LONG) or self._documents(1)
    if not self._long:
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
      asked += [(text, [(a + at, b + at)]) for text, (a, b) in gaps]
      parts.append(kept)
      at += len(kept)
    others = self._without_some(self._document(rng, 8192), rng)[1]
    return self._talk("cloze", np.concatenate(parts), asked,
                      [text for text, _ in others], count, rng)

  def code(self, number: int, count: int = 48) -> History:
    """Names that are defined once and used elsewhere, and their definitions."""
    rng = np.random.default_rng([self._seed, 6, number])
    kind = {"code": self._long["code"]} if "code" in self._long else self._long
    others = set(_DEFINES.findall(
      self._tokenizer.decode(self._document(rng, 8192, kind))))
    parts, asked, at = [], [], 0
    while at < self._length:
      text = self._tokenizer.decode(self._document(rng, 8192, kind))
      names = Counter(re.findall(r"\w+", text))
      others -= names.keys()
      defined = Counter(_DEFINES.findall(text))
      starts = [m.start() for m in _DEFINES.finditer(text)]
      for a, b in itertools.pairwise([0, *starts, len(text)]):
        ids = self._tokenizer.encode(text[a:b])
        found = _DEFINES.match(text[a:b])
        if found and defined[found[1]] == 1 < names[found[1]]:
          asked.append((found[1], [(at, at + min(len(ids), _BELOW))]))
        parts.append(ids)
        at += len(ids)
    def lookup(name: str) -> str:
      name = name if rng.integers(4) else name.replace("_", " ")
      return str(rng.choice(_LOOKUPS)).format(name)

    return self._talk(
      "code", np.concatenate(parts), [(lookup(n), p) for n, p in asked],
      [lookup(name) for name in sorted(others)], count, rng)

  def _talk(self, kind: str, ids: np.ndarray, asked: Sequence[tuple],
            others: Sequence[str], count: int, rng) -> History:
    """A text [N], and so many prompts about it and about what it lacks.

    Args:
      kind: of the prompts.
      ids: of the text.
      asked: (prompt, the token spans that answer it).
      others: prompts of this kind that nothing in the text answers.
      count: prompts at most.
      rng: what is drawn by.
    """
    talk = Talk(ids, self._tokenizer, rng)
    foreign = [some for some in (others, self._strangers, self._world(ids))
               if some]
    for i in rng.permutation(len(asked))[:count].tolist():
      text, places = asked[i]
      if foreign and rng.integers(_OTHERS) == 0:
        some = foreign[int(rng.integers(len(foreign)))]
        text, places = some[int(rng.integers(len(some)))], []
      talk.ask(kind, text, places, made_up.wrong_answer(rng))
    return talk.history()

  def facts(self, number: int, count: int = 24) -> History:
    """Made-up facts in text and in turns of a chat, and questions on them."""
    rng = np.random.default_rng([self._seed, 3, number])
    host = np.concatenate([self._document(rng, self._length // 3)
                           for _ in range(3)])
    alike = rng.integers(2) == 0  # many differ in names and values alone
    sorts = rng.permutation(made_up.SORTS)[: _FEW if alike else None].tolist()
    drawn = [made_up.draw(rng, sorts) for _ in range(count)]
    pairs = [(i, i + 1) for i in range(0, count - 1, 2)
             if not alike and rng.integers(2)]
    for i, j in pairs:
      drawn[i], drawn[j] = made_up.draw_two(rng)
    changed: dict[int, int] = {}
    told = drawn.copy()  # and what some of them were before, told earlier
    for i in sorted({*range(count)} - {i for pair in pairs for i in pair}):
      if not alike and rng.integers(2):
        earlier, drawn[i] = made_up.draw_changed(rng)
        told[i] = drawn[i]
        told.append(earlier)
        changed[len(told) - 1] = i
    order = rng.permutation(len(told))
    for earlier, later in changed.items():
      a, b = sorted(np.flatnonzero(np.isin(order, (earlier, later))).tolist())
      order[a], order[b] = earlier, later
    cuts = np.sort(rng.integers(0, len(host), len(told)))
    chat = self._tokenizer.has_chat_template and rng.integers(2) == 0
    repeats = rng.integers(_REPEATS) == 0
    parts, at, total = [], 0, 0
    places: dict[int, tuple[int, int]] = {}
    for i, cut in zip(order.tolist(), cuts.tolist()):
      piece, span = self._told(told[i], bool(chat), bool(repeats), rng)
      parts += [host[at:cut], piece]
      total += cut - at
      places[i] = total + span[0], total + span[1]
      total, at = total + len(piece), cut
      if repeats and not chat and rng.integers(3) == 0:
        asked = typed(drawn[int(rng.integers(count))].question, rng)
        line = "\n" + str(rng.choice(_QUOTED)).format(asked) + "\n"
        parts.append(self._tokenizer.encode(line))
        total += len(parts[-1])
    talk = Talk(np.concatenate([*parts, host[at:]]), self._tokenizer, rng)
    leans = {j: drawn[j].leaning for i, j in pairs if talk.goes_on
             and drawn[i].name in drawn[i].question and drawn[j].leaning}
    for i, fact in enumerate(drawn):
      question = leans[i] if i in leans and rng.integers(4) else fact.question
      talk.ask("facts", question, [places[i]], made_up.wrong_answer(rng))
    for _ in range(count // 4):
      some = rng.permutation(count)[: int(rng.integers(2, 5))].tolist()
      talk.ask("facts", _joined([drawn[i].question for i in some], rng),
               [places[i] for i in sorted(some)], made_up.wrong_answer(rng))
    lacking = [some for some in (
      [made_up.draw(rng).question for _ in range(count)], self._strangers,
      self._world(host)) if some]
    for _ in range(count // 3):
      if rng.integers(3):
        some = lacking[int(rng.integers(len(lacking)))]
        text = some[int(rng.integers(len(some)))]
        talk.ask("nothing", text, [], made_up.wrong_answer(rng))
      else:
        talk.ask("nothing", str(rng.choice(_IDLE)), [], made_up.reply(rng),
                 as_it_is=True)
    return talk.history()

  def _world(self, ids: np.ndarray) -> list[str]:
    """Questions about the world that a text [N] hardly answers."""
    return world.lacking(words_of(self._tokenizer.decode(ids)))

  def reworded(self, number: int, count: int = 24) -> History:
    """Everyday facts among text, and questions in other words."""
    rng = np.random.default_rng([self._seed, 5, number])
    host = np.concatenate([self._document(rng, self._length // 3)
                           for _ in range(3)])
    order = rng.permutation(len(self._reworded)).tolist()
    chosen, others = order[:count], [
      self._reworded[i][1] for i in order[count:]]
    cuts = np.sort(rng.integers(0, len(host), len(chosen))).tolist()
    parts, asked, at, total = [], [], 0, 0
    for cut, i in zip(cuts, chosen):
      fact, question = self._reworded[i]
      end = str(rng.choice(_ENDS))
      piece = self._tokenizer.encode(f" {fact}{end}")
      parts += [host[at:cut], piece]
      total += cut - at
      asked.append((question, [(total, total + len(piece))]))
      total, at = total + len(piece), cut
    return self._talk("reworded", np.concatenate([*parts, host[at:]]), asked,
                      others, count, rng)

  def listed(self, number: int, count: int = 24) -> History:
    """Entries of one form, and look-ups of one or several of their keys."""
    rng = np.random.default_rng([self._seed, 7, number])
    drawn = lists.draw(rng)
    lines = [self._tokenizer.encode(line + "\n") for _, line in drawn.entries]
    room = max(self._length // 8, self._length - sum(map(len, lines)))
    host = np.concatenate([self._document(rng, room // 2) for _ in range(2)])
    low, high = 0, len(host) + 1
    together = rng.integers(4)
    if together == 0:  # one list in four stands together
      low = int(rng.integers(len(host)))
      high = low + 1
    elif together == 1:  # one is all there is
      host, high = host[:0], 1
    cuts = np.sort(rng.integers(low, high, len(lines)))
    parts, at, total = [], 0, 0
    places: dict[str, list[tuple[int, int]]] = {}
    for (key, _), line, cut in zip(drawn.entries, lines, cuts.tolist()):
      if cut > at:  # an entry begins a line
        parts.append(np.concatenate([
          host[at:cut], self._tokenizer.encode("\n")]))
        total, at = total + len(parts[-1]), cut
      parts.append(line)
      places.setdefault(key, []).append((total, total + len(line)))
      total += len(line)
    keys, asked = list(places), []
    for _ in range(count):
      few = 1 if rng.integers(4) else int(rng.integers(2, 5))
      some = [keys[i] for i in rng.permutation(len(keys))[:few].tolist()]
      asked.append((drawn.question(some, rng), sorted(
        place for key in some for place in places[key])))
    others = [drawn.question([key], rng) for key in drawn.missing]
    return self._talk("listed", np.concatenate([*parts, host[at:]]), asked,
                      others, count, rng)

  def text(self, number: int, count: int = 24) -> History:
    """Text that is read on, in steps, to its end."""
    rng = np.random.default_rng([self._seed, 4, number])
    ids = self._document(rng, _TEXT)
    if rng.integers(2):  # another text comes between
      cut = len(ids) - _FUTURE - count * _SPACING // 2
      ids = np.concatenate([
        ids[:cut], self._document(rng, count * _SPACING // 3), ids[cut:]])
    last = (len(ids) - _FUTURE) // BRANCHING * BRANCHING
    cursors = range(last, max(len(ids) // 2, _QUERY), -_SPACING)
    return History(ids, tuple(
      Example("text", ids[c - _QUERY : c], False, (), c, ids[c : c + _FUTURE])
      for c in sorted(cursors[:count])))

  def _document(self, rng, longest: int,
                kinds: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """A part of a document; of several where all of them are short.

    Of `kinds`, {kind: documents}; of any by default.
    """
    kinds = kinds or self._long
    ids = self._part(rng, longest, kinds)
    while len(ids) < min(longest, _LONG):
      ids = np.concatenate([ids, self._part(rng, longest, kinds)])
    return ids[:longest]

  def _part(self, rng, longest: int, kinds) -> np.ndarray:
    names = sorted(kinds)
    kind = names[int(rng.integers(len(names)))]
    ids = self._stores[kind].document(int(rng.choice(kinds[kind])))
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
      title = bool(_TITLE.match(piece))
      if i in taken and rng.integers(3):  # one in three stays where it is
        gaps.append((taken[i], (total, total + _BELOW) if title else
                     (max(0, total - 32), total + 64)))
        continue
      encoded = self._tokenizer.encode(
        piece if piece.endswith("\n") else piece + " ")
      if i in taken:
        gaps.append((self._quoted(taken[i], rng), (
          total, total + len(encoded) + (_BELOW if title else 0))))
      parts.append(encoded)
      total += len(encoded)
    gaps = [(t, (a, min(b, total))) for t, (a, b) in gaps if a < total]
    return np.concatenate(parts).astype(np.int32), gaps

  def _quoted(self, piece: str, rng) -> str:
    """A piece of text as a prompt quotes it: as it is, or asked about."""
    if rng.integers(2):
      return piece
    return str(rng.choice(_QUOTES)).format(piece)

  def _told(self, fact: made_up.Fact, chat: bool, repeats: bool, rng):
    """Ids of a fact as it is told, and the span of what tells it in them.

    In a `chat`, where it `repeats`, half of the facts were asked for in vain.
    """
    tokenizer = self._tokenizer
    lead = tokenizer.encode(f" {fact.lead}") if fact.lead else []
    if not chat:
      end = str(rng.choice(_ENDS))
      ids = np.concatenate([np.asarray(lead, np.int32),
                            tokenizer.encode(f" {fact.text}{end}")])
      return ids.astype(np.int32), (len(lead), len(ids))
    messages = [{"role": "user", "content": f"{fact.lead} {fact.text}".strip()},
                {"role": "assistant", "content": made_up.reply(rng)}]
    if repeats and rng.integers(2):  # asked for before, and wrongly answered
      messages += [{"role": "user", "content": typed(fact.question, rng)},
                   {"role": "assistant", "content": made_up.wrong_answer(rng)}]
    turn = tokenizer.chat(messages, first=False, add_generation_prompt=False)
    own = np.flatnonzero(turn.owner == 0)
    start = min(int(own[0]) + len(lead), int(own[-1]))
    return turn.ids, (start, int(own[-1]) + 1)
