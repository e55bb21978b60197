"""Questions about the world at large, which a history most often lacks."""

from __future__ import annotations

import re

QUESTIONS = (
  "How high is Mount Kilimanjaro?", "Who painted the Mona Lisa?",
  "In which year did the Titanic sink?", "What is the currency of Thailand?",
  "How many people live in Iceland?", "Who discovered penicillin?",
  "Which language do they speak in Brazil?", "How far away is the Moon?",
  "Who wrote War and Peace?", "What is the boiling point of mercury?",
  "Who won the football World Cup in 1998?", "When did Rome fall?",
  "What is the largest city of Nigeria?", "Who composed the Magic Flute?",
  "How long is the Amazon?", "Which planet is closest to the Sun?",
  "Who was the first man on the Moon?", "How old is the Eiffel Tower?",
  "What do pandas eat?", "How many strings has a violin?",
  "When was Albert Einstein born?", "Who invented the telephone?",
  "What is the tallest building in Dubai?", "Where is Machu Picchu?",
  "What is the chemical symbol of gold?", "Who is the king of Norway?",
  "How do I bake sourdough bread?", "What is the weather in Lisbon today?",
  "How many legs has a spider?", "Name the oceans of the Earth.",
  "Which country has the most volcanoes?", "Who founded Microsoft?",
  "What is the square root of 1764?", "How deep is Lake Baikal?",
  "When did the Berlin Wall come down?", "Who sang Bohemian Rhapsody?",
  "What is the population of Kenya?", "How fast can a cheetah run?",
  "Who directed Jurassic Park?", "Which river flows through Budapest?",
  "When is Chinese New Year?", "What does the heart do?",
  "Translate good evening into Spanish.", "How many bones has a human hand?",
  "Who wrote Don Quixote?", "What is the flag of Canada like?",
  "Wie hoch ist der Mont Blanc?", "Wer schrieb den Faust?",
  "Wo liegt Kathmandu?", "Wie viele Einwohner hat Wien?",
  "Quelle est la monnaie du Japon ?", "Where were the Olympics of 2012 held?",
  "What time is it in Sydney?", "Which metal melts first, tin or iron?",
  "How many moons has Jupiter?", "Who is the mayor of Chicago?",
  "What was the name of Napoleon's horse?", "How do vaccines work?",
  "What is the highest waterfall in Venezuela?", "Who built Stonehenge?",
)
_WORD = re.compile(r"\w{4,}")


def lacking(words: set[str]) -> list[str]:
  """Those of which some word of four letters or more is not among `words`.

  Args:
    words: of a text, in lower case.
  """
  return [q for q in QUESTIONS if set(_WORD.findall(q.casefold())) - words]
