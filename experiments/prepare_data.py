"""Fetches and tokenises the training and held-out text.

  python -m experiments.prepare_data                    about 3 Mtok a kind
  python -m experiments.prepare_data --config.full      all, about 170 Mtok
  python -m experiments.prepare_data --config.full --config.million_tokens=12
  python -m experiments.prepare_data --config.kinds=code,wiki
  python -m experiments.prepare_data --base=FOLDER --config.folder=STORE \
    --files='notes/**/*.md,posts.jsonl' --kind=notes       your own text

tools/prepare_data does the same, and takes the settings without "config.".
"""

import pathlib

from absl import flags

from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.parallel.places import local
from mcjax.training.common import data, own_text, prepare
from mcjax.types import McjaxError

_CONFIG = commands.ConfigFlag(__file__, "data")
_FILES = flags.DEFINE_list(
  "files", [], "Your own files, folders and patterns instead of what is "
  "fetched; .jsonl and .parquet hold a document a row.")
_KIND = flags.DEFINE_string(
  "kind", prepare.OWN, "What your own text is called in mixtures.")
_BASE = flags.DEFINE_string(
  "base", "", "Whose tokenizer; the configuration's if empty.")


def main(argv) -> None:
  del argv
  c = _CONFIG.value
  folder = local(c.folder or data.default_folder())
  default = None if c.full else 3.0
  budget = default if c.million_tokens is None else c.million_tokens
  lm = load_base_lm(_BASE.value or c.base)
  text = [*_FILES.value, *c.text]
  if text:
    if not c.folder:
      raise McjaxError("own text needs a store of its own: --config.folder=DIR")
    records = prepare.prepare_own(
      lm, folder, own_text.read(text, tuple(c.suffixes), c.field), _KIND.value)
  else:
    records = prepare.prepare(
      lm, folder, pathlib.Path(c.books), budget, c.full, list(c.kinds))
  print(prepare.told(records))
  print(f"store: {folder}")


def cli() -> None:
  commands.run(main, _CONFIG)


if __name__ == "__main__":
  cli()
