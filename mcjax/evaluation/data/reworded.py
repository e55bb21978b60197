"""Questions that share no telling word with the fact they ask for.

Everyday facts, each asked about in other words, so that matching words does not
find them. They belong to the evaluation: nothing is trained or chosen on them.
"""

from __future__ import annotations

import numpy as np

from mcjax.evaluation.data.planted import Need
from mcjax.types import McjaxError

_FACTS = (
  ("The ferry skipper retired to grow roses in his garden.",
   "What does the old boat captain do these days?", "rose"),
  ("Mum hid the birthday presents inside the washing machine.",
   "Where were the gifts concealed?", "washing"),
  ("The jury found the accountant guilty of fraud.",
   "Of which crime was the bookkeeper convicted?", "fraud"),
  ("A wasp stung the goalkeeper just before half-time.",
   "Which insect hurt the player?", "wasp"),
  ("The tailor shortened the trousers by four centimetres.",
   "How much cloth was cut off the pants?", "four"),
  ("Lightning struck the church tower and split the bell.",
   "What broke during the thunderstorm?", "bell"),
  ("The couple spent their honeymoon in a lighthouse.",
   "Where did the newlyweds go on vacation?", "lighthouse"),
  ("The nurse measured a temperature of 39.4 degrees.",
   "How high was the patient's fever?", "39.4"),
  ("My uncle earns his living by repairing accordions.",
   "What profession does that relative have?", "accordion"),
  ("The thief escaped on a stolen bicycle.",
   "How did the robber get away?", "bicycle"),
  ("The chef ruined the sauce with too much garlic.",
   "Which ingredient spoiled the cook's dish?", "garlic"),
  ("The orphan was raised by two Dutch aunts.",
   "Who brought up the boy without parents?", "aunts"),
  ("The mayor resigned after photographs from a casino were printed.",
   "Why did the head of the town step down?", "casino"),
  ("The tourists got lost because their map was upside down.",
   "Why could the travellers not find the way?", "upside"),
  ("The violin was insured for ninety thousand francs.",
   "What was the value of the musical instrument?", "ninety"),
  ("The toddler swallowed a marble and was taken to hospital.",
   "What object did the little kid eat by accident?", "marble"),
  ("The bakery opens at a quarter to six every morning.",
   "At what time can one buy fresh bread?", "six"),
  ("The prisoners dug their tunnel with spoons.",
   "Which tool did the inmates use for breaking out of jail?", "spoon"),
  ("The millionaire left his entire fortune to a parrot sanctuary.",
   "Who inherited the rich man's money?", "parrot"),
  ("The kitchen floor is heated by water from a hot spring.",
   "How do they keep the room for cooking warm?", "spring"),
  ("The knight's sword was forged from a meteorite.",
   "What was the warrior's weapon made of?", "meteorite"),
  ("The wolf was scared off by the sound of a trumpet.",
   "What noise drove the wild beast away?", "trumpet"),
  ("The speech lasted eleven minutes and nobody applauded.",
   "How long did the politician talk to the audience?", "eleven"),
  ("The motor stalled since there was sand in the petrol.",
   "Why did the car engine stop?", "sand"),
  ("The painter only uses blue after sunset.",
   "Which colour does the artist work with in the evening?", "blue"),
  ("Grandma pays her taxes in February.",
   "In which month does the old lady settle what she owes the state?",
   "February"),
  ("The twins can only be told apart by a scar on the chin.",
   "How does one distinguish the identical siblings?", "scar"),
  ("The refugees crossed the mountains on mules.",
   "On what did the people who fled ride?", "mule"),
  ("The hotel charges 85 euros for a double room.",
   "What does one night of accommodation cost?", "85"),
  ("The professor forgot his umbrella on the tram.",
   "What did the teacher leave behind on public transport?", "umbrella"),
  ("The queen was buried with her favourite falcon.",
   "Which animal lies in the royal grave?", "falcon"),
  ("The gardener kills snails with beer.",
   "What is used against pests among the plants?", "beer"),
  ("The fire started when a candle fell on the carpet.",
   "What caused the house to burn?", "candle"),
  ("The spy passed the documents inside a hollow loaf.",
   "How did the secret agent hand over the papers?", "loaf"),
  ("The novel took its author seventeen years.",
   "How long did the writer work on the book?", "seventeen"),
  ("The soldiers polished their boots with banana skins.",
   "What did the troops clean their shoes with?", "banana"),
  ("The bride arrived an hour late because of a flat tyre.",
   "What delayed the woman getting married?", "tyre"),
  ("The island has no school, so lessons are given over the radio.",
   "How are pupils out there taught?", "radio"),
  ("The dentist keeps a tank of piranhas in the waiting room.",
   "What pets does the man who fixes teeth have?", "piranha"),
  ("The drought emptied the reservoir down to a tenth.",
   "How much water was left after months without rain?", "tenth"),
)


def draw(count: int, number: int, seed: int) -> list[Need]:
  """`count` needs of history `number`; no fact is in two histories.

  Raises:
    McjaxError: there are not that many facts.
  """
  order = np.random.default_rng(seed).permutation(len(_FACTS))
  chosen = order[number * count : (number + 1) * count]
  if len(chosen) < count:
    raise McjaxError(f"there are {len(_FACTS)} reworded facts: not enough for "
                     f"{number + 1} histories of {count}")
  return [Need(*_FACTS[i]) for i in chosen]
