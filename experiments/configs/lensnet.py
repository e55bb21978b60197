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
from mcjax.types import McjaxError


def get_config(size=""):
  """The run; see `LensRunConfig` for the fields.

  Some 37,000 windows of prompts, 20 ms each, and 0.15 s a step on two idle
  cores; `lensnet.py:large` has 200,000 (10 GB on disk and in memory).
  `lensnet.py:text` teaches what blocks are worth while text is read on, which
  the base measures: 8 to 13 s a window. `initial` gives the table of keys, and
  scores to start from where they were trained on the first of today's
  features; for another GistNet start from the shipped weights with fewer steps.
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
                   reworded=1.0, listed=1.5)
  if size == "large":
    c.windows.update(passes=10, facts=700, cloze=350, code=700, reworded=1220,
                     listed=400)
    c.train.update(steps=6000, learning_rate=1e-3)
  elif size == "text":
    c.windows.update(
      questions=(), facts=0, cloze=0, code=0, reworded=0, listed=0, text=40)
    c.mixture = dict(text=1.0)
    c.train.update(steps=600, learning_rate=7e-4)
  elif size:
    raise McjaxError(
      f"no size {size!r} of lensnet.py; there are large and text")
  return c
