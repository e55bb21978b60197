"""Trains a GistNet and its adapter on windows as the loop has them, on a CPU.

Command:
  python -m experiments.train_gistnet --workdir=RUN --config.data=STORE \
    --config=experiments/configs/gistnet_loop.py:120 \
    --config.initial=GISTNET --export=RESULT
The adapter alone, so that trees written by that GistNet stay good:
  --config.train.learning_rate=0
"""

from experiments.configs import gistnet


def get_config(steps="120"):
  """Sink, up to 32 gists, some spans expanded, 32 to 256 raw tokens.

  A step has two windows, weighed by what the teacher gains from far text; every
  fifth has gists of another text, which should change nothing.
  """
  c = gistnet.get_config(steps)
  c.dtype = "float32"
  c.mixture = dict(prose=1.0, docs=1.25, wiki=0.75, code=1.25, chat=0.15)
  few = dict(loop=True, near=64, segment=256, window=864)
  many = dict(loop=True, near=32, segment=128, window=1088)
  upper = dict(loop=True, upper=1, expanded=2, near=160, segment=128,
               window=1728)
  behind = dict(loop=True, expanded=2, near=256, segment=128, window=1440)
  foreign = dict(foreign=True, near=128, segment=64, window=960)
  c.phases = [dict(steps=int(steps),
                   turns=[few, many, upper, behind, foreign])]
  c.train.update(dict(batch=2, micro_batch=1, optimizer="adamw",
                      learning_rate=2e-4, adapter_rate=1e-3, warmup=5,
                      decay_fraction=1.0, log_every=1, evaluate_every=1000,
                      save_every=10, validation_documents=0))
  return c
