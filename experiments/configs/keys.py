"""Keys of LensNet for SmolLM2-135M, taught by all-MiniLM-L6-v2.

Command:
  tools/prepare_data --full --million_tokens=14 --folder=STORE
  python -m experiments.train_keys --workdir=RUN --config.data=STORE \
    --export=mcjax/pretrained/smollm2-135m/lensnet.safetensors
"""

import ml_collections


def get_config():
  """The run; `distil` holds fields of `KeyConfig`."""
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.lensnet = ""  # whose keys; the shipped one
  c.data = ""  # the default folder
  c.held_blocks = 2000
  c.held_questions = 1000
  c.distil = dict(key_dim=128, steps=1600, learning_rate=3e-3)
  return c
