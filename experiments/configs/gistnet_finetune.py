"""Fits a trained GistNet to the window of the loop, on a CPU.

Command:
  python -m experiments.train_gistnet --workdir=RUN --config.data=STORE \
    --config=experiments/configs/gistnet_finetune.py:150 \
    --config.initial=GISTNET --export=RESULT
"""

from experiments.configs import gistnet


def get_config(steps="150"):
  """Gists of other text, far gists behind 256 recent tokens, and as before."""
  c = gistnet.get_config(steps)
  c.mixture = dict(prose=1.0, docs=1.25, wiki=0.75, code=1.25, chat=0.15)
  foreign = dict(foreign=True, near=256, segment=64, window=2048 + 256 + 64)
  loop = dict(sink=True, near=256, window=1344, kl_segments=2)
  upper = dict(level=2, window=1088, segment=64, kl_segments=1, nll=0.2)
  c.phases = [dict(steps=int(steps),
                   turns=[foreign, {}, loop, foreign, {}, upper])]
  c.train.update(dict(learning_rate=4e-4, decay_fraction=1.0, warmup=5,
                      log_every=1, evaluate_every=1000))
  return c
