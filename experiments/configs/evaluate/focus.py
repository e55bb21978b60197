"""Whether what matters is in detail, for every policy, and whether it pays.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/focus.py
One part alone: --config.parts=planted
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `focus.py:quick` is small."""
  return suite("focus", size)
