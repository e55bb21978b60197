"""Fetches and tokenises the training and held-out text.

  python -m experiments.prepare_data                    about 3 Mtok a kind
  python -m experiments.prepare_data --config.full      all, about 170 Mtok
  python -m experiments.prepare_data --config.full --config.million_tokens=12
  python -m experiments.prepare_data --config.kinds=code,wiki

tools/prepare_data does the same in an environment of its own, and takes the
settings without the "config.".
"""

import pathlib

from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.training.common import data, prepare

_CONFIG = commands.ConfigFlag(__file__, "data")


def main(argv) -> None:
  del argv
  c = _CONFIG.value
  folder = pathlib.Path(c.folder or data.default_folder())
  budget = c.million_tokens
  if budget is None and not c.full:
    budget = 3.0
  records = prepare.prepare(
    load_base_lm(c.base), folder, pathlib.Path(c.books), budget, c.full,
    list(c.kinds))
  for r in records:
    print(f"{r['split']:<11}{r['kind']:<8}{r['documents']:>6} documents "
          f"{r['tokens'] / 1e6:8.2f} Mtok")
  print(f"store: {folder}")


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
