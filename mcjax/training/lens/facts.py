"""Made-up facts in many wordings, and questions in other words than they.

The wordings are the training's own; the evaluation has others, and its texts
come from other sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mcjax.training.lens import names

_VALUES = {
  "place": ("Bergen Cusco Leuven Osaka Durban Malaga Tartu Hobart Ghent Salta "
            "Bristol Nantes Lagos Porto Quito Turin").split(),
  "thing": ("silver compass, copper kettle, woollen banner, glass anchor, "
            "paper lantern, wooden flute, iron key, velvet drum, marble "
            "sphere, leather map, blue bicycle, brass clock").split(", "),
  "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
  "job": ("baker, surveyor, pilot, beekeeper, archivist, plumber, violinist, "
          "translator, welder, gardener").split(", "),
  "colour": "red green blue yellow purple orange grey white".split(),
  "food": ("lentil soup, plum cake, fried rice, goat cheese, black bread, "
           "pickled herring, mushroom pie").split(", "),
}
# (how it may be told, how it may be asked for, kind of value)
_FACTS = (
  (("The password for {name} is {value}.",
    "To get into {name}, type {value}.",
    "{name} opens with the word {value}."),
   ("What is the password for {name}?", "How do I log in to {name}?",
    "access word of {name}?"), "word"),
  (("{name} keeps a {value} in the hallway.",
    "In the hallway of {name} there stands a {value}."),
   ("What does {name} keep in the hallway?", "Which object does {name} store?"),
   "thing"),
  (("The meeting with {name} takes place on {value}.",
    "We agreed with {name} to talk on {value}.",
    "{name} can see you on {value}."),
   ("When does the meeting with {name} take place?",
    "On which day do we meet {name}?", "the date of the talk with {name}?"),
   "day"),
  (("{name} grew up in {value}.", "{name} spent all childhood in {value}.",
    "As a child {name} lived in {value}."),
   ("Where did {name} grow up?", "In which city was {name} a child?",
    "Which town is {name} from?"), "place"),
  (("The locker of {name} has the number {value}.",
    "{name} uses locker {value}."),
   ("Which number has the locker of {name}?",
    "Where are the things of {name} locked away?"), "number"),
  (("The function {name} returns {value} when the file is missing.",
    "Without a file, {name} gives back {value}."),
   ("What does the function {name} return when the file is missing?",
    "What comes out of {name} if there is no file?"), "number"),
  (("{name} works as a {value}.", "{name} earns a living as a {value}.",
    "By trade {name} is a {value}."),
   ("What is the job of {name}?", "What does {name} do for work?",
    "What is {name}'s profession?"), "job"),
  (("The ship {name} sails under the flag of {value}.",
    "{name} is a vessel registered in {value}."),
   ("Under which flag does the ship {name} sail?",
    "Where is the boat {name} registered?"), "place"),
  (("{name} painted the front door {value}.",
    "The door of {name}'s house is {value} now."),
   ("What colour is the door of {name}?",
    "How did {name} paint the entrance?"), "colour"),
  (("{name} cannot stand {value}.", "{name} never eats {value}.",
    "For {name}, {value} is the worst dish."),
   ("Which food does {name} dislike?", "What should I not cook for {name}?"),
   "food"),
  (("Doctor {name} prescribed {value} drops a day.",
    "According to doctor {name}, take {value} drops daily."),
   ("How many drops a day did doctor {name} prescribe?",
    "What dose did doctor {name} order?"), "number"),
  (("My {kin} is called {name} and lives in {value}.",
    "{name}, my {kin}, moved to {value}."),
   ("Where does my {kin} live?", "In which city is my {kin} now?"), "place"),
  (("The {name} project has a budget of {value} euros.",
    "For {name} we may spend {value} euros."),
   ("How much money does the {name} project have?",
    "What is the budget of {name}?"), "number"),
  (("{name} leads the {word} team.", "The {word} team is headed by {name}."),
   ("Who leads the {word} team?", "Who is in charge of {word}?",
    "the boss of the {word} team?"), "word"),
)
# What names somebody first, where the fact then begins with a pronoun.
_LEADS = ("Let me tell you about {name}.", "{name} came up today.",
          "There is some news of {name}.", "You may have heard of {name}.",
          "We talked about {name} for a while.", "{name} sends greetings.",
          "Yesterday I read a page on {name}.")
_PRONOUNS = ("It", "She", "He", "They", "This one")
_LEANING = ("it", "she", "he", "they", "this one", "them", "him", "her", "that")
_CHANGES = ("Correction:", "No, that is wrong.", "This has changed.",
            "I was mistaken before.", "Actually,", "An update:",
            "Not any more:")
_KIN = "sister brother cousin aunt uncle neighbour grandmother".split()
_REPLIES = ("Noted.", "Thank you, I will remember that.", "Good to know!",
            "I see, thanks for telling me.", "Understood.")
_WRONG = ("I am not sure, but it may be in the archive.", "It is 42.",
          "I do not know.", "That would be Tuesday, in Paris.",
          "The answer depends on the context.")


class Fact(NamedTuple):
  """A made-up fact and a question about it.

  Attributes:
    text: tells it.
    question: asks for it.
    lead: sentence before it that says whom or what it is about, or "".
    name: whom or what it is about.
    leaning: the question with a pronoun for the name; "" where that has none.
  """

  text: str
  question: str
  lead: str = ""
  name: str = ""
  leaning: str = ""


SORTS = len(_FACTS)  # of facts


def draw(rng: np.random.Generator, sorts: Sequence[int] = range(SORTS)) -> Fact:
  """A made-up fact in one of its wordings, and one question about it.

  Args:
    rng: what is drawn by.
    sorts: numbers of the facts to draw from.
  """
  return _drawn(rng, int(rng.choice(sorts)), names.name(rng))


def draw_two(rng: np.random.Generator) -> tuple[Fact, Fact]:
  """Two facts on one name; the question about the second may lean on it."""
  first, second = rng.permutation(len(_FACTS))[:2].tolist()
  name = names.name(rng)
  return _drawn(rng, first, name), _drawn(rng, second, name)


def draw_changed(rng: np.random.Generator) -> tuple[Fact, Fact]:
  """A fact as it was told first, and as it is told later, when it holds."""
  number, name = int(rng.integers(len(_FACTS))), names.name(rng)
  before, now = _drawn(rng, number, name), _drawn(rng, number, name)
  if not now.lead and rng.integers(2):
    now = now._replace(lead=str(rng.choice(_CHANGES)))
  return before, now


def pronoun(rng: np.random.Generator) -> str:
  """One for a name that was said before."""
  return str(rng.choice(_LEANING))


def _drawn(rng: np.random.Generator, number: int, name: str,
           leads: bool = True) -> Fact:
  """Fact `number` about a name, with what names that first if it `leads`."""
  told, asked, kind = _FACTS[number]
  word = names.syllables(rng).lower()
  if kind == "number":
    value = str(rng.integers(100, 100000))
  elif kind == "word":
    value = word + str(rng.integers(10, 100))
  else:
    value = str(rng.choice(_VALUES[kind]))
  fields = dict(name=name, value=value, word=word,
                kin=str(rng.choice(_KIN)))
  text, question = str(rng.choice(told)), str(rng.choice(asked))
  lead = ""
  if (leads and text.startswith("{name} ") and "{name}" in question
      and rng.integers(2)):
    lead = str(rng.choice(_LEADS)).format(**fields)
    if rng.integers(2):  # another fact about it
      other = (number + int(rng.integers(1, len(_FACTS)))) % len(_FACTS)
      lead = _drawn(rng, other, name, leads=False).text
    text = str(rng.choice(_PRONOUNS)) + text.removeprefix("{name}")
  leaning = ""
  if "{name}" in question:
    leaning = question.format(**{**fields, "name": pronoun(rng)})
  return Fact(text.format(**fields), question.format(**fields), lead, name,
              leaning)


def reply(rng: np.random.Generator) -> str:
  """What a model says when it is told something."""
  return str(rng.choice(_REPLIES))


def wrong_answer(rng: np.random.Generator) -> str:
  """An answer that holds nothing of the fact."""
  return str(rng.choice(_WRONG))
