"""What splicing costs in quality: NLL of splice minus exact.

Command:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/drift.py
The default steps take hours on 2 CPU cores.
"""

from experiments.configs.evaluate import suite


def get_config(size=""):
  """The fields of the suite's `Settings`; `drift.py:quick` is small."""
  return suite("drift", size)
