"""Improves a tree's gists by gradient; see tools/refine_gists."""

from __future__ import annotations

import time

from absl import flags

import mcjax
from mcjax.base import hub
from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.cli import commands
from mcjax.training.gist.refine import Fitted, Refiner
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_TREE = flags.DEFINE_string("tree", None, "The tree.", required=True)
_BUDGET = flags.DEFINE_float("budget", 10.0, "Minutes.", lower_bound=0)
_SPAN = flags.DEFINE_string(
  "span", "", "Only tokens A:B of the history; either may be left out.")
_GISTNET = flags.DEFINE_string(
  "gistnet", None, "GistNet weights of the tree; the shipped ones by default.")
_BASE = flags.DEFINE_string("base", "smollm2-135m", "Base LM of the tree.")


def _span(text: str) -> tuple[int, int | None]:
  start, colon, stop = text.partition(":")
  if text and not (colon and f"{start or 0}{stop or 0}".isdigit()):
    raise McjaxError(f"--span must be A:B in tokens, got {text!r}")
  return int(start or 0), int(stop) if stop else None


def _say(fitted: Fitted, left: int) -> None:
  outcome = "replaced" if fitted.replaced else "kept"
  print(f"block {fitted.start:,}: KL {fitted.before:.3f} -> "
        f"{fitted.after:.3f}, {outcome}; {left:,} spans left", flush=True)


def main(argv) -> None:
  del argv
  span = _span(_SPAN.value)
  use_compilation_cache(hub.cache_dir() / "xla")
  lm = mcjax.load_base_lm(_BASE.value)
  encoder = mcjax.load_gistnet(lm, _GISTNET.value)
  with MegaContextTree.open(
      _TREE.value, base_fingerprint=lm.fingerprint, base_name=lm.name,
      encoder=encoder) as tree:
    begin = time.monotonic()
    refiner = Refiner(tree, lm, encoder)
    fitted = refiner.run(60 * _BUDGET.value, *span, report=_say)
    seconds = time.monotonic() - begin
    better = sum(f.replaced for f in fitted)
    print(f"{_TREE.value}: {len(fitted):,} spans in {seconds:.0f} s, gists of "
          f"{better:,} replaced, {len(refiner.todo(*span)):,} left")
    for name, found in refiner.recovered(fitted).items():
      print(f"recovered {name}: {found['value']:.3f} "
            f"[{found['low']:.3f}, {found['high']:.3f}], {found['n']} spans")


if __name__ == "__main__":
  commands.run(main)
