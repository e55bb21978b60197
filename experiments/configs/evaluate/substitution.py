"""What a gist recovers of the loss that dropping its tokens causes.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/substitution.py
Expected: 0.46 of the loss recovered by the shipped GistNet.
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `substitution.py:quick` is small."""
  return suite("substitution", size)
