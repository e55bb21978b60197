"""Losses of long documents, and the windows at which a visible gist pays.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/perplexity.py
The frontier alone: --config.systems=
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `perplexity.py:quick` is small."""
  return suite("perplexity", size)
