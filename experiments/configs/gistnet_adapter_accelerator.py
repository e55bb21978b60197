"""Trains what reads a trained GistNet's gists, on one accelerator.

GistNet stays as it is, so trees written by it, and the LensNet that reads its
gists, stay good. `--config.gistnet.lora_rank=16` trains LoRA of the base's
attention at gists besides.

Command, two minutes on one H200 after as long for compiling:
  tools/prepare_data --full --million_tokens=7 --folder=STORE
  python -m experiments.train_gistnet --workdir=RUN --config.data=STORE \
    --config=experiments/configs/gistnet_adapter_accelerator.py:750 \
    --config.initial=GISTNET --export=RESULT
"""

from experiments.configs import gistnet_accelerator


def get_config(steps="750"):
  """Gists directly before the scored text, as in the loop, and of other text.

  A step has 32 windows of 512 to 1,344 tokens, 24,400 on average.
  """
  c = gistnet_accelerator.get_config(steps)
  c.gistnet.rounds = None  # as it is
  c.train.update(optimizer="adamw", learning_rate=0.0, warmup=20,
                 decay_fraction=0.8)
  longer = dict(segment=64)
  loop = dict(loop=True, near=64, segment=256, window=864)
  foreign = dict(foreign=True, near=256, segment=64, window=1344, nll=0.0)
  upper = dict(level=2, window=1088, segment=64, kl_segments=1)
  c.phases = [dict(steps=int(steps), turns=[
    {}, longer, loop, {}, foreign, {}, upper])]
  return c
