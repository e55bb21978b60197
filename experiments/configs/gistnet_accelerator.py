"""GistNet on one accelerator; --config.base names another base.

Command, with --config.initial=GISTNET to train one on:
  tools/prepare_data --full --million_tokens=14 --folder=STORE
  python -m experiments.train_gistnet --workdir=RUN --config.data=STORE \
    --config=experiments/configs/gistnet_accelerator.py:4300 \
    --export=mcjax/pretrained/smollm2-135m/gistnet.safetensors
"""

from experiments.configs import gistnet


def get_config(steps="4300"):
  """As `gistnet.py`, with a deeper network, larger steps and more text.

  The first part scores segments directly after the gists alone; the second
  adds gists of another text, gists of gists and windows as the loop has them:
  a sink, gists of which a few are expanded, and recent text. A step of 16,384
  tokens of the first part took 0.11 s on one H200 (27 GB of its memory), after
  a minute of compilation.
  """
  c = gistnet.get_config(steps)
  c.mixture = dict(prose=1.0, docs=1.25, wiki=0.75, code=1.5, chat=0.15)
  c.gistnet.update(rounds=3, adapter_rank=24)  # widths are the base's
  c.objective.nll = 0.2
  c.train.update(dict(batch=32, micro_batch=32, learning_rate=2e-3,
                      adapter_rate=2e-3, warmup=50, decay_fraction=0.7,
                      log_every=19, evaluate_every=1000, save_every=500,
                      validation_documents=10))
  longer = dict(segment=64)
  foreign = dict(foreign=True, near=256, segment=64, window=1024 + 256 + 64,
                 nll=0.0)
  upper = dict(level=2, window=1088, segment=64, kl_segments=1)
  few = dict(loop=True, near=64, segment=256, window=864)
  many = dict(loop=True, near=32, segment=128, window=1088)
  behind = dict(loop=True, expanded=2, near=256, segment=128, window=1440)
  first = int(steps) * 2 // 5
  c.phases = [
    dict(steps=first, turns=[{}, longer]),
    dict(steps=int(steps) - first, turns=[
      {}, few, longer, foreign, {}, many, upper, {}, longer, behind])]
  return c
