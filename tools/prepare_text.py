"""Fetches and tokenises the training and held-out text; see tools/prepare_data.

  tools/prepare_data                   about 3 Mtok a kind, a few minutes
  tools/prepare_data --full            everything, about 170 Mtok
  tools/prepare_data --full --million_tokens=12   of everything 12 Mtok a kind
  tools/prepare_data --kinds=code,wiki only these kinds
"""

import pathlib
import sys

from absl import app, flags

import mcjax.base.load
from mcjax.training.common import data, prepare
from mcjax.types import McjaxError

_BASE = flags.DEFINE_string("base", "smollm2-135m", "base model")
_FOLDER = flags.DEFINE_string("folder", None, "store; the user cache if unset")
_BOOKS = flags.DEFINE_string(
  "books", "../shared/data/public-domain-books.jsonl.xz",
  "public-domain books, one JSON object a line")
_MILLIONS = flags.DEFINE_float(
  "million_tokens", None, "budget a kind; 3 if unset, none with --full")
_FULL = flags.DEFINE_bool("full", False, "all packages")
_KINDS = flags.DEFINE_list("kinds", [], "only these kinds")


def main(argv):
  del argv
  folder = pathlib.Path(_FOLDER.value or data.default_folder())
  budget = _MILLIONS.value
  if budget is None and not _FULL.value:
    budget = 3.0
  try:
    records = prepare.prepare(
      mcjax.base.load.load_base_lm(_BASE.value), folder,
      pathlib.Path(_BOOKS.value), budget, _FULL.value, _KINDS.value)
  except McjaxError as error:
    sys.exit(f"prepare_data: {error}")
  for r in records:
    print(f"{r['split']:<11}{r['kind']:<8}{r['documents']:>6} documents "
          f"{r['tokens'] / 1e6:8.2f} Mtok")
  print(f"store: {folder}")


if __name__ == "__main__":
  app.run(main)
