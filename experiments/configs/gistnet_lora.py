"""Trains LoRA of the base's attention for reading a trained GistNet's gists.

The GistNet stays as it is, so trees written by it stay good; the base's weights
are frozen. The maps act at gists alone; --config.gistnet.lora_scope=all has
them on every row. --peft=FOLDER writes them in PEFT's layout besides.

Command:
  python -m experiments.train_gistnet --workdir=RUN --config.data=STORE \
    --config=experiments/configs/gistnet_lora.py:200 \
    --config.initial=GISTNET --export=RESULT --peft=FOLDER
"""

from experiments.configs import gistnet_adapter


def get_config(steps="200"):
  """As the adapter is trained, with maps of rank 8 beside it."""
  c = gistnet_adapter.get_config(steps)
  c.gistnet.adapter_rank = None
  c.gistnet.lora_rank = 8
  c.gistnet.lora_scope = "gists"
  c.train.update(adapter_rate=5e-4)
  return c
