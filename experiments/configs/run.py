"""The loop over SmolLM2-135M.

  python -m experiments.run --config=experiments/configs/run.py \
    --tree=runs/book --ingest=book.txt --prompt="Who is the harbour master?"

Ingests at > 5,000 tokens/s on 2 CPU cores; a short answer takes seconds.
"""

import dataclasses

from ml_collections import config_dict

from mcjax.config import Config


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """`arg` names the base model; the default one if empty."""
  config = config_dict.ConfigDict()
  config.base = arg or "smollm2-135m"
  config.dtype = "float32"
  config.max_new_tokens = 128
  loop = dataclasses.asdict(Config())
  loop.pop("telemetry_path")
  config.loop = config_dict.ConfigDict(loop)
  return config
