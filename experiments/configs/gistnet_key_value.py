"""Trains a writer of gists that are keys and values, on a CPU.

One slot a block with keys and values of its own in every layer
(`mcjax/gist/key_value.py`). GistNet itself stays as it is.

Command:
  python -m experiments.train_gistnet --workdir=RUN --config.data=STORE \
    --config=experiments/configs/gistnet_key_value.py:150 \
    --config.initial=GISTNET --export=RESULT
Expected: `recovered key_value` beside the vectors' at every evaluation.
"""

from experiments.configs import gistnet_adapter


def get_config(steps="150"):
  """Two windows of 512 tokens a step, gists directly before the scored text."""
  c = gistnet_adapter.get_config(steps)
  c.gistnet.adapter_rank = None
  c.gistnet.key_value = True
  c.phases = [dict(steps=int(steps), turns=[dict(key_value=True)])]
  c.train.update(adapter_rate=3e-3, evaluate_every=50, validation_documents=6)
  return c
