"""Trains an adapter for a trained GistNet, which stays as it is, on a CPU.

Trees written by that GistNet, and the LensNet that reads its gists, stay good.

Command:
  python -m experiments.train_gistnet --workdir=RUN --config.data=STORE \
    --config=experiments/configs/gistnet_adapter.py:360 \
    --config.initial=GISTNET --export=RESULT
"""

from experiments.configs import gistnet


def get_config(steps="360"):
  """Two thirds gists directly before the scored text, else as in the loop.

  A step has two windows.
  """
  c = gistnet.get_config(steps)
  c.mixture = dict(prose=1.0, docs=1.25, wiki=0.75, code=1.25, chat=0.15)
  c.gistnet.adapter_rank = 24
  foreign = dict(foreign=True, near=256, segment=64, window=2048 + 256 + 64)
  upper = dict(level=2, window=1088, segment=64, kl_segments=1, nll=0.2)
  loop = dict(sink=True, near=256, window=1344, kl_segments=2)
  c.phases = [dict(steps=int(steps), turns=[
    {}, {}, foreign, {}, {}, upper, {}, {}, loop])]
  c.train.update(dict(batch=2, micro_batch=1, optimizer="adamw",
                      learning_rate=0.0, adapter_rate=2e-3, warmup=5,
                      decay_fraction=1.0, log_every=1, evaluate_every=90,
                      save_every=15, validation_documents=8))
  return c
