"""A small LensNet on your own text, to try all parts out, on a CPU.

Command, some minutes, after `gistnet_tiny`:
  python -m experiments.train_lensnet --config=lensnet_tiny \
    --config.base=BASE --config.data=STORE --config.gistnet=GISTNET \
    --workdir=RUN --export=RUN/lensnet.safetensors
"""

from experiments.configs import lensnet


def get_config(steps="30"):
  """No natural questions; histories of 4,096 tokens, a few of each kind."""
  c = lensnet.get_config()
  c.windows.update(questions=(), facts=4, cloze=4, code=2, reworded=2, listed=2,
                   text=1,
                   validation=1, length=4096)
  c.mixture = dict(facts=1.5, cloze=1.0, code=1.0, reworded=1.0,
                   listed=1.0, text=1.0)
  c.train.update(dict(steps=int(steps), batch=8, warmup=3, log_every=1,
                      evaluate_every=1000, save_every=10))
  return c
