"""Every suite, one report.

Command, hours on 2 CPU cores; the same command goes on where it stopped:
  python -m experiments.evaluate \
    --config=experiments/configs/evaluate/all.py --workdir=runs/all
"""

from ml_collections import config_dict

from experiments.configs.evaluate import suite
from mcjax.evaluation import runner


def get_config(size=""):
  """The settings of each suite under its name; `all.py:quick` is small.

  base, dtype, gistnet and lensnet are those of all suites.
  """
  c = config_dict.ConfigDict()
  c.suite = "all"
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.gistnet = ""
  c.lensnet = ""
  c.only = ()  # names of suites; all if empty
  c.suites = config_dict.ConfigDict()
  for name in runner.NAMES:
    one = suite(name, size)
    del one.suite
    for shared in ("base", "dtype", "gistnet", "lensnet"):
      one[shared] = c.get_ref(shared)
    c.suites[name] = one
  return c
