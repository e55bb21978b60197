"""Two cycles of GistNet and LensNet for SmolLM2-135M on a CPU.

Command:
  tools/prepare_data
  python -m experiments.alternate --config=experiments/configs/alternate.py \
    --workdir=RUN
"""

import ml_collections

from experiments.configs import gistnet, lensnet


def get_config(steps="200"):
  """`--config=experiments/configs/alternate.py:400`: 400 GistNet steps a cycle.

  See `Alternation`.
  """
  c = ml_collections.ConfigDict()
  c.base = "smollm2-135m"
  c.dtype = "float32"
  c.data = ""
  c.initial = ""  # the shipped one; a fresh one where none is shipped
  c.cycles = 2
  c.gist = gistnet.get_config(steps)
  c.lens = lensnet.get_config()
  for name in ("base", "dtype", "data"):  # of the whole run
    del c.gist[name], c.lens[name]
  del c.gist.initial, c.lens.gistnet, c.lens.initial
  c.lens.windows.update(
    passes=1, facts=12, cloze=8, code=8, reworded=8, listed=8, text=4)
  c.lens.mixture.text = 1.0
  c.lens.train.steps = 300
  return c
