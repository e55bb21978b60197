"""Fetches and tokenises the training and held-out text.

  python -m experiments.prepare_data                    about 3 Mtok a kind
  python -m experiments.prepare_data --config.full      all, about 170 Mtok
  python -m experiments.prepare_data --config.full --config.million_tokens=12
  python -m experiments.prepare_data --config.kinds=code,wiki
  python -m experiments.prepare_data --config.text=notes/ --config.folder=STORE

tools/prepare_data does the same in an environment of its own, and takes the
settings without the "config.".
"""

import pathlib

from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.runtime.text_files import read_documents
from mcjax.training.common import data, prepare
from mcjax.types import McjaxError

_CONFIG = commands.ConfigFlag(__file__, "data")


def main(argv) -> None:
  del argv
  c = _CONFIG.value
  folder = pathlib.Path(c.folder or data.default_folder())
  budget = c.million_tokens
  if budget is None and not c.full:
    budget = 3.0
  lm = load_base_lm(c.base)
  if c.text:
    if not c.folder:
      raise McjaxError("own text needs a store of its own: --config.folder=DIR")
    records = prepare.prepare_own(lm, folder, (
      (d.name, d.text) for d in read_documents(c.text, c.suffixes)))
  else:
    records = prepare.prepare(
      lm, folder, pathlib.Path(c.books), budget, c.full, list(c.kinds))
  for r in records:
    print(f"{r['split']:<11}{r['kind']:<8}{r['documents']:>6} documents "
          f"{r['tokens'] / 1e6:8.2f} Mtok")
  print(f"store: {folder}")


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
