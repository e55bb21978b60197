"""RULER's 13 tasks, BABILong-style facts and a pass key, side by side.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/needle.py
Longer: --config.lengths=131072,1048576 --config.samples=1
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `needle.py:quick` is small."""
  return suite("needle", size)
