"""Whether the LM should attend to the gists in its window.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/visible.py
Expected: a difference near zero; see the model card's gist_attention.
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `visible.py:quick` is small."""
  return suite("visible", size)
