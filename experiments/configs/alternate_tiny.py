"""Two small cycles of GistNet and LensNet on your own text, on a CPU.

Command, some minutes:
  python -m experiments.alternate --config=alternate_tiny --config.base=BASE \
    --config.data=STORE --workdir=RUN
"""

from experiments.configs import alternate, gistnet_tiny, lensnet_tiny


def get_config(steps="5"):
  """`steps` of GistNet and of LensNet a cycle; `alternate_tiny:STEPS`."""
  c = alternate.get_config(steps)
  small = gistnet_tiny.get_config(steps)
  for name in ("mixture", "objective", "phases", "train"):
    c.gist[name] = small[name]
  small = lensnet_tiny.get_config(steps)
  for name in ("windows", "mixture", "train"):
    c.lens[name] = small[name]
  return c
