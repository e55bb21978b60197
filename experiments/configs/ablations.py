"""Which ablations of GistNet are run, and how long each.

Command, about five minutes an ablation on 2 idle CPU cores:
  python -m experiments.ablate_gistnet --workdir=runs/ablation \
    --config.names=baseline,wide
"""

import ml_collections


def get_config():
  """See `gistnet_ablation.py` for what each of them changes."""
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "bfloat16"  # float32 where the CPU has no bfloat16 products
  c.data = ""  # the default folder
  c.names = ()  # all
  c.steps = 80  # optimizer steps of each
  c.batch = 2  # windows of 512 tokens a step
  c.micro_batch = 2  # of them in memory at once
  return c
