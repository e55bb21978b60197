"""Every suite at a small size, one report: what works, not what is true.

Command, at most half an hour on 2 CPU cores:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/all_small.py --workdir=runs/all_small
"""

from experiments.configs.evaluate import all as every


def get_config():
  """As `all.py:quick`."""
  return every.get_config("quick")
