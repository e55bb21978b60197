"""Keys of a small LensNet on your own text, to try all parts out, on a CPU.

Command, some minutes:
  python -m experiments.train_keys --config=keys_tiny --config.base=BASE \
    --config.data=STORE --config.lensnet=LENSNET --workdir=RUN --export=FILE
"""

from experiments.configs import keys


def get_config(steps="20"):
  """A few hundred blocks, and the questions that a short text may hold."""
  c = keys.get_config()
  c.held_blocks, c.held_questions = 50, 4
  c.distil.update(blocks=300, questions=12, near=32, steps=int(steps), batch=8)
  return c
