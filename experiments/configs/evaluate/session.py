"""A coding session and a chat about several topics, turn by turn.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/session.py
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `session.py:quick` is small."""
  return suite("session", size)
