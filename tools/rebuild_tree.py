"""Rewrites what a network made of a tree; see tools/regist and tools/rekey."""

from __future__ import annotations

import time

from absl import flags
from tqdm import tqdm

import mcjax
from mcjax.cli import commands
from mcjax.lens import policy as lensnet_policy
from mcjax.tree.tree import MegaContextTree

_WHAT = flags.DEFINE_enum(
  "what", None, ["gists", "lens keys"], "What is rewritten.", required=True)
_TREE = flags.DEFINE_string("tree", None, "The tree.", required=True)
_GISTNET = flags.DEFINE_string(
  "gistnet", None, "GistNet weights; the shipped ones by default. Of lens "
  "keys: those that the tree was written with.")
_LENSNET = flags.DEFINE_string(
  "lensnet", None, "LensNet weights; the shipped ones by default.")
_BASE = flags.DEFINE_string("base", "smollm2-135m", "Base LM of the tree.")


def main(argv) -> None:
  del argv
  gists = _WHAT.value == "gists"
  lm = mcjax.load_base_lm(_BASE.value)
  encoder = mcjax.load_gistnet(lm, _GISTNET.value)
  keyer = None if gists else lensnet_policy.load_keyer(lm, _LENSNET.value)
  tree = MegaContextTree.open(
    _TREE.value, base_fingerprint=lm.fingerprint, base_name=lm.name,
    encoder=None if gists else encoder)
  begin = time.perf_counter()
  with tqdm(unit=" nodes", unit_scale=True) as bar:

    def told(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    if gists:
      tree.rebuild_gists(encoder, told)
    else:
      tree.rebuild_lens_keys(keyer, told)
  nodes = sum(tree.num_nodes(l) for l in range(1, tree.top_level + 1))
  tree.close()
  network = ("GistNet", encoder) if gists else ("LensNet", keyer)
  print(f"{_TREE.value}: {nodes:,} {_WHAT.value} of {tree.cursor:,} tokens "
        f"rewritten by {network[0]} {network[1].fingerprint[:12]} in "
        f"{time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
  commands.run(main)
