"""GistNet for SmolLM2-135M on a CPU.

Command:
  tools/prepare_data
  python -m experiments.train_gistnet --config=experiments/configs/gistnet.py \
    --workdir=RUN --export=mcjax/pretrained/smollm2-135m/gistnet.safetensors
"""

import ml_collections


def get_config():
  """The run; see `TrainConfig`, `Objective` and `GistNetConfig` for fields."""
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.data = ""
  c.initial = ""
  c.mixture = dict(prose=1.0, docs=1.0, wiki=1.0, code=1.0, chat=0.5)
  c.gistnet = ml_collections.ConfigDict()
  c.objective = dict(window=512, segment=32, kl=1.0)
  c.phases = [
    dict(steps=1500, objective=dict(attend=10.0, kl=0.0)),
    dict(steps=1500, objective={}),
  ]
  c.train = dict(batch=8, learning_rate=1e-3, warmup=20, evaluate_every=100,
                 save_every=25)
  return c
