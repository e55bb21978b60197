"""How far one vector for 32 tokens goes: gists fitted by gradient.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/ceiling.py
Expected: 0.71 recovered after 36 steps. Takes hours on 2 CPU cores.
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `ceiling.py:quick` is small."""
  return suite("ceiling", size)
