"""Everyday prompts: does the shipped LensNet read the right place?

Documentation, company text and code stand in one history, behind the
project's documents as they were when these prompts were written: text that no
edit of today's documents changes. One conversation of statements, imperatives,
follow-ups with pronouns, misspelled, lower-case and German prompts, of two
facts at once, and some that nothing answers; each is answered and remembered.
"""

import pathlib

import pytest

from mcjax.config import Config
from mcjax.runtime.megacontext import MegaContext
from mcjax.testing import tiny_base

DOCS = pathlib.Path(__file__).parent / "everyday"

HANDBOOK = """\
# Working at Northwind Ferries

Northwind Ferries runs six ships between the islands. Our head office is in
Tromsvik, on the second floor of the old customs house. Marta Lindqvist leads
the operations team; she joined from the coast guard in 2016.

Leave: everybody has 27 days of paid leave a year. Up to five unused days move
into the next year, but they expire at the end of March. Ask your team lead at
least two weeks ahead, in the calendar and not by mail.

Expenses are paid back on the 15th of each month. Send receipts to
kvitto@northwind.example before the 5th. Meals on trips are covered up to 42
euros a day without receipts.

The ship Havorn was built in 1998 and carries 340 passengers. It was
refitted in 2021, when both diesel engines were replaced by batteries. The ship
Skarven carries cars only and sails at night.

If the fire alarm rings, leave by the stairs and meet at the flagpole across
the street. Do not use the lift. The warden of each floor wears an orange vest.

The bittern project moves our booking system to new servers. It is led by
Ravi Chandran, and it has to be finished before the summer season starts on
June 3rd. The largest risk is the export of old customer records.

Kaffeekasse: Jeder Becher kostet 50 Cent. Die Maschine im dritten Stock wird
jeden Freitag von Jonas gereinigt.
"""

MANUAL = """\
# tidelog: a small logger for tide gauges

Install tidelog with `make install PREFIX=/opt/tidelog`. It needs a compiler
for C11 and nothing else.

The gauge is read every 90 seconds. Change that with the option `interval` in
tidelog.ini; values below 10 are refused because the sensor needs time to
settle.

When the serial cable is unplugged, tidelog keeps running and writes the line
`GAP` once a minute until data come back. It never fills gaps by itself.

Log files are rotated at midnight UTC and kept for 400 days. Older ones are
removed by `tidelog prune`, which asks first unless `--yes` is given.

To calibrate a gauge, note the water level by eye, run `tidelog calibrate
LEVEL`, and repeat at the next low tide. Two points are enough.

Error E17 means that the clock of the gauge is more than five minutes off. Set
it with `tidelog clock --sync`, which needs a network connection.
"""

CODE = '''\
# gauges/filters.py

def despike(levels, limit=0.35):
  """Replaces jumps of more than `limit` metres by the mean of neighbours."""
  out = list(levels)
  for i in range(1, len(out) - 1):
    if abs(out[i] - out[i - 1]) > limit:
      out[i] = (out[i - 1] + out[i + 1]) / 2
  return out


def load_station(path):
  """Reads a station file; raises StationError when the header is missing."""
  with open(path) as lines:
    header = next(lines, "")
  if not header.startswith("#station"):
    raise StationError(f"{path}: no header")
  return header.split()[1]


MAX_RETRIES = 7  # of an upload, then the batch is dropped
'''

# (what is typed, all that must be read; nothing where nothing answers)
PROMPTS = (
  ("Who leads the operations team?", ("Marta Lindqvist",)),
  ("who leads the bittern project", ("Ravi Chandran",)),
  ("And by when must it be finished?", ("June 3rd",)),  # the project
  ("WHERE IS THE HEAD OFFICE", ("Tromsvik",)),
  ("Remind me how many days of paid leave we get.", ("27 days",)),
  ("I need to know where to send my receipts.", ("kvitto@",)),
  ("Tell me what happens to unused leave days", ("expire",)),
  ("Describe what to do if the fire alarm rings.", ("flagpole",)),
  ("Summarise what the manual says about unplugged cables.", ("GAP",)),
  ("Explain how to calibrate a gauge.", ("tidelog calibrate",)),
  ("what does error E17 mean?", ("clock of the gauge",)),
  ("how often is the guage read", ("90 seconds",)),
  ("how long are log fles kept?", ("400 days",)),
  ("Does tidelog fill gaps by itself?", ("never fills gaps",)),
  ("When was the Havorn built and how many passengers does it carry?",
   ("1998", "340")),
  ("Is it an electric ship?", ("batteries",)),  # the Havorn
  ("Which function removes spikes from the levels?", ("despike",)),
  ("What does load_station raise when there is no header?", ("StationError",)),
  ("how many times is an upload retried", ("MAX_RETRIES",)),
  ("Was kostet ein Becher Kaffee?", ("50 Cent",)),
  ("Wer reinigt die Maschine?", ("Jonas",)),
  ("What is the capital of Mongolia?", ()),
  ("Thanks, that was very helpful!", ()),
  ("What did the mayor say about the new swimming pool?", ()),
)


@pytest.mark.slow
def test_everyday_prompts_read_the_right_place(smollm2):
  mc = MegaContext.create(tiny_base.memory_url(), smollm2, Config())
  for path in sorted(DOCS.glob("*.md")):
    mc.ingest(path.read_text(encoding="utf-8"), name=path.name)
  for name, text in (("handbook", HANDBOOK), ("manual", MANUAL),
                     ("filters.py", CODE)):
    mc.ingest(text, name=name)
  right, invented = [], []
  for prompt, expected in PROMPTS:
    out = mc.generate(prompt, max_new_tokens=24)
    read = " ".join(" ".join(s.text for s in out.sources).split())
    if not expected and read:
      invented.append(prompt)
    elif all(words in read for words in expected):
      right.append(prompt)
    print(f"{out.answerable:.2f}", prompt in right, prompt, "->", read[:160])
  mc.close()
  assert len(PROMPTS) == 24
  assert len(right) >= 20, f"{len(right)} of 24"
  assert len(invented) <= 1, invented
