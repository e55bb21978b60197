"""Keys of LensNet for SmolLM2-135M, taught by all-MiniLM-L6-v2.

Command:
  tools/prepare_data --full --million_tokens=14 --folder=STORE
  python -m experiments.train_keys --workdir=RUN --config.data=STORE \
    --export=mcjax/pretrained/smollm2-135m/lensnet.safetensors

For a base of another vocabulary, without teaching anything (minutes):
  python -m experiments.train_keys --config=keys --workdir=RUN \
    --config.base=qwen2.5-coder-0.5b --config.carry_from=smollm2-135m \
    --config.data=STORE --config.distil.blocks=2001 \
    --config.distil.questions=1001 --export=keys.safetensors
"""

import ml_collections

from mcjax.cli import configs
from mcjax.training.lens.key_distil import KeyConfig


def get_config():
  """The run; `distil` holds the fields of `KeyConfig`."""
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.carry_from = ""  # a base whose LensNet's keys are carried over
  c.lensnet = ""  # whose keys; the shipped one
  c.data = ""  # the default folder
  c.held_blocks = 2000
  c.held_questions = 1000
  c.distil = configs.defaults(KeyConfig)
  return c
