"""LensNet for SmolLM2-135M on a CPU.

Command:
  tools/prepare_data
  python -m experiments.train_lensnet --config=experiments/configs/lensnet.py \
    --workdir=RUN --export=mcjax/pretrained/smollm2-135m/lensnet.safetensors
"""

import ml_collections

from mcjax.cli import configs
from mcjax.lens.network import LensNetConfig
from mcjax.training.lens.labels import LabelConfig
from mcjax.training.lens.losses import LensObjective
from mcjax.training.lens.trainer import LensTrainConfig


def get_config():
  """The run; see `LensRoundsConfig` for the fields.

  Labelling costs most: on 2 idle CPU cores 2 to 3 s a window, about 4 windows
  a task. Training overfits early, so the weights kept are those with the lowest
  regret on the validation windows.
  """
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.gistnet = ""  # the shipped one
  c.data = ""  # the default folder
  c.lens = configs.defaults(LensNetConfig, without=("d_model",))
  c.labels = configs.defaults(LabelConfig)
  c.objective = configs.defaults(LensObjective)
  c.train = configs.defaults(
    LensTrainConfig, without=("steps",), learning_rate=7e-4, weight_decay=0.1,
    evaluate_every=60)
  c.longest = 16384
  c.validation_every = 7
  c.pairs = 4096
  c.rounds = [dict(tasks=240, steps=300), dict(tasks=60, steps=300)]
  return c
