"""Time to the first token behind a long text, against the usual ways.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/ttft.py
Flat in the length of the history, where full attention grows with its square.
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `ttft.py:quick` is small."""
  return suite("ttft", size)
