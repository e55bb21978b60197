"""A run's telemetry as one HTML page; see tools/view_focus."""

import pathlib

from absl import flags

import mcjax
from mcjax.cli import commands, focus_page
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_TREE = flags.DEFINE_string("tree", "", "The run's tree, for its text.")
_BASE = flags.DEFINE_string("base", "smollm2-135m", "Base LM of the tree.")


def main(argv) -> None:
  if len(argv) != 2:
    raise McjaxError("name one run: its folder or its telemetry.jsonl")
  run = pathlib.Path(argv[1])
  found = focus_page.records(run)
  known = focus_page.kept_texts(run)
  if _TREE.value:
    lm = mcjax.load_base_lm(_BASE.value)
    tree = MegaContextTree.open(
      _TREE.value, base_fingerprint=lm.fingerprint, base_name=lm.name,
      encoder=None)
    known = focus_page.texts(
      found, lambda a, b: lm.tokenizer.decode(tree.tokens(a, b).tolist()),
      tree.cursor)
    tree.close()
  print(focus_page.write(run, known))


if __name__ == "__main__":
  commands.run(main, rest=True)
