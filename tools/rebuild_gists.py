"""Rewrites a tree's gists with another GistNet; see tools/regist."""

from __future__ import annotations

import time

from absl import flags

import mcjax
from mcjax.cli import commands
from mcjax.tree.tree import MegaContextTree

_TREE = flags.DEFINE_string("tree", None, "The tree.", required=True)
_GISTNET = flags.DEFINE_string(
  "gistnet", None, "Weights (safetensors); the shipped ones by default."
)
_BASE = flags.DEFINE_string("base", "smollm2-135m", "Base LM of the tree.")


def main(argv) -> None:
  del argv
  lm = mcjax.load_base_lm(_BASE.value)
  encoder = mcjax.load_gistnet(lm, _GISTNET.value)
  tree = MegaContextTree.open(
    _TREE.value, base_fingerprint=lm.fingerprint, base_name=lm.name,
    encoder=None,
  )
  begin = time.perf_counter()
  tree.rebuild_gists(encoder)
  nodes = sum(tree.num_nodes(l) for l in range(1, tree.top_level + 1))
  tree.close()
  print(f"{_TREE.value}: {nodes:,} gists of {tree.cursor:,} tokens rewritten "
        f"by GistNet {encoder.fingerprint[:12]} in "
        f"{time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
  commands.run(main)
