"""What the loop costs a decoded token, beside plain decode of the base.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/overhead.py
Decode with the loop is within a few per cent of plain decode at every length.
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `overhead.py:quick` is small."""
  return suite("overhead", size)
