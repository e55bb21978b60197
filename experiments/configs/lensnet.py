"""LensNet for SmolLM2-135M on a CPU.

Command:
  tools/prepare_data
  python -m experiments.train_lensnet --config=experiments/configs/lensnet.py \
    --workdir=RUN --export=mcjax/pretrained/smollm2-135m/lensnet.safetensors
"""

import ml_collections

from mcjax.cli import configs
from mcjax.lens.network import LensNetConfig
from mcjax.training.lens.losses import LensObjective
from mcjax.training.lens.run import LensWindows
from mcjax.training.lens.trainer import LensTrainConfig


def get_config():
  """The run; see `LensRunConfig` for the fields.

  On two idle cores 10 ms a window of a question, some 20,000 of them, and 0.15
  s a step. `initial` gives the table of keys, and scores to start from where
  they were trained on the same features; for another GistNet start from the
  shipped weights with fewer steps.
  """
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.gistnet = ""  # the shipped one
  c.initial = ""  # the shipped one
  c.data = ""  # the default folder
  c.lens = configs.defaults(LensNetConfig, without=("d_model", "features"))
  c.windows = configs.defaults(LensWindows, questions=(
    "../shared/data/fairytale-questions.jsonl.xz",
    "../shared/data/meeting-questions.jsonl.xz"))
  c.objective = configs.defaults(LensObjective)
  c.train = configs.defaults(LensTrainConfig)
  c.mixture = dict(fairytale=3.0, meeting=2.0, facts=1.5, cloze=1.0, code=1.0,
                   reworded=1.0, text=1.0)
  return c
