"""A small GistNet on your own text, to try all parts out, on a CPU.

Command, a minute of CPU time with the default base:
  python -m experiments.prepare_data --config.text=notes/ --config.folder=STORE
  python -m experiments.train_gistnet --config=gistnet_tiny \
    --config.data=STORE --workdir=RUN --export=RUN/gistnet.safetensors
Expected: `recovered` above the last token's, far below the shipped one's.
"""

from experiments.configs import gistnet


def get_config(steps="10"):
  """All kinds of the store in equal shares; gists before the scored text.

  `gistnet_tiny:STEPS` runs so many steps, of one window of 128 tokens each.
  """
  c = gistnet.get_config(steps)
  c.dtype = "float32"
  c.mixture = {}
  c.phases = [dict(steps=int(steps), turns=[{}])]
  c.objective.window = 128
  c.train.update(dict(batch=1, micro_batch=1, warmup=1, log_every=1,
                      evaluate_every=1000, validation_documents=2))
  return c
