"""The choice of sentences, for a trained LensNet, on a CPU.

Command:
  python -m experiments.train_reader --config=experiments/configs/reader.py \
    --workdir=RUN --export=mcjax/pretrained/smollm2-135m/lensnet.safetensors
"""

import ml_collections

from mcjax.cli import configs
from mcjax.training.lens.run import LensWindows
from mcjax.training.lens.sentences import ReaderFit


def get_config():
  """The run; see `ReaderConfig` for the fields.

  On an idle core some 0.1 s a question, about 5,000 of them, and a minute for
  the fit.
  """
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.gistnet = ""  # the shipped one
  c.lensnet = ""  # the shipped one
  c.data = ""  # the default folder
  c.carry_from = ""  # base whose shipped choice is taken over, without a fit
  c.windows = configs.defaults(LensWindows, questions=(
    "../shared/data/fairytale-questions.jsonl.xz",
    "../shared/data/meeting-questions.jsonl.xz"),
    passes=1, most=10, facts=40, cloze=8, code=0, reworded=10, listed=24,
    text=0, validation=3)
  c.fit = configs.defaults(ReaderFit)
  c.mixture = dict(fairytale=4.0, meeting=1.0, facts=2.0, cloze=1.0,
                   reworded=1.0, listed=1.5)
  return c
