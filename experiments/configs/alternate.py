"""Two cycles of GistNet and LensNet for SmolLM2-135M on a CPU.

Command:
  tools/prepare_data
  python -m experiments.alternate --config=experiments/configs/alternate.py \
    --workdir=RUN
"""

import ml_collections

from experiments.configs import gistnet, lensnet


def get_config(steps="200"):
  """`--config=experiments/configs/alternate.py:400`: 400 GistNet steps a cycle.

  See `Alternation`; `initial` is a GistNet to start from.
  """
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.data = ""
  c.initial = "mcjax/pretrained/smollm2-135m/gistnet.safetensors"
  c.cycles = 2
  c.gist = gistnet.get_config(steps)
  c.lens = lensnet.get_config()
  c.lens.rounds = [dict(tasks=48, steps=200)]
  return c
