"""The loop over SmolLM2-135M.

  python -m experiments.run --config=experiments/configs/run.py \
    --tree=runs/book --ingest=book.txt --prompt="Who is the harbour master?"

Ingests at > 5,000 tokens/s on 2 CPU cores; a short answer takes seconds.
"""

from ml_collections import config_dict

from mcjax.cli import configs
from mcjax.config import Config


def get_config(base: str = "smollm2-135m") -> config_dict.ConfigDict:
  """`--config=experiments/configs/run.py:NAME` takes another base model.

  `loop` has the fields of `mcjax.Config`.
  """
  c = config_dict.ConfigDict()
  c.base = base
  c.dtype = "float32"
  c.gistnet = ""  # weights of your own; the shipped ones of the base
  c.lensnet = ""  # weights of your own; the shipped ones of the base
  c.max_new_tokens = 128
  c.loop = configs.defaults(Config)
  return c
