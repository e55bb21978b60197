"""Natural questions about stories or meetings, every system side by side.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/questions.py
Where the evidence is, without running the base LM:
  --config.evidence_only=true --config.questions=80
Choose on the validation split, report on test: --config.split=test
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `questions.py:quick` is small."""
  return suite("questions", size)
