"""GistNet for SmolLM2-135M on one accelerator.

Command:
  tools/prepare_data --full --million_tokens=12 --folder=STORE
  python -m experiments.train_gistnet --workdir=RUN --config.data=STORE \
    --config=experiments/configs/gistnet_accelerator.py:2600 \
    --export=mcjax/pretrained/smollm2-135m/gistnet.safetensors
"""

from experiments.configs import gistnet


def get_config(steps="2600"):
  """As `gistnet.py`, with a deeper network, larger steps and more text.

  2,600 steps of 16,384 tokens take six minutes on one H200 (27 GB of its
  memory), after two minutes of compilation.
  """
  c = gistnet.get_config(steps)
  c.mixture = dict(prose=1.0, docs=1.25, wiki=0.75, code=1.25, chat=0.15)
  c.gistnet = dict(width=192, heads=6, mlp_width=216, slot_parts=4,
                   slot_mlp_width=384, children_layers=1, rounds=3)
  c.train.update(dict(batch=32, micro_batch=32,
                      learning_rate=3e-3, warmup=50, log_every=19,
                      evaluate_every=1000, save_every=500,
                      validation_documents=10))
  first = int(steps) // 2
  loop = dict(sink=True, near=128, kl_segments=3)
  upper = dict(level=2, window=1088, segment=64, kl_segments=1, nll=0.2)
  c.phases = [
    dict(steps=first, turns=[{}]),
    dict(steps=int(steps) - first, turns=[{}, loop, {}, upper])]
  return c
