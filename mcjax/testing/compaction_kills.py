"""Kills processes that compact a tree, and looks at what they leave.

  python -m mcjax.testing.compaction_kills FOLDER KILLS SEED

A process of its own, since it forks.
"""

from __future__ import annotations

import collections
import os
import pathlib
import signal
import sys
import time

import numpy as np

from mcjax.testing import torture
from mcjax.testing import tree_reference as reference
from mcjax.tree.check import check
from mcjax.tree.compaction import compact
from mcjax.tree.tree import MegaContextTree

_TOKENS = 70_000  # of a new tree
_SPAN = 3000  # tokens of a forgotten document
_WAITS = 0.02, 3.0  # seconds until a kill, evenly in their logarithm


def _models():
  return reference.TinyEncoder(), reference.TinyKeyer()


def _compact(url: str) -> None:
  compact(url, _models)


def _open(url: str, mode: str = "a") -> MegaContextTree:
  return MegaContextTree.open(
    url, encoder=reference.TinyEncoder(), keyer=reference.TinyKeyer(),
    mode=mode, **reference.BASE)


def prepare(url: str, forgotten: int) -> None:
  """Forgets one more document; the tree begins, or grows by a little."""
  if not forgotten:
    tree = reference.create(url, keyer=reference.TinyKeyer())
    tree.append(torture.stream(0, _TOKENS))
  else:
    tree = _open(url)
    tree.append(torture.stream(tree.cursor, tree.cursor + 900))
  start = forgotten * _SPAN
  tree.journal.add("forgotten", start=start, stop=start + _SPAN)
  tree.commit()
  tree.close()


def compare(url: str) -> str:
  """The state a kill left, "old" or "new", or what is wrong with it."""
  with _open(url, "r") as tree:
    ids = torture.stream(0, tree.cursor)
    spans = tree.journal.forgotten
    *before, last = np.arange(0, spans.max(), _SPAN).tolist()
    for start in before:
      ids[start : start + _SPAN] = 0
    new = not tree.tokens(last, last + _SPAN).any()
    if new:
      ids[last : last + _SPAN] = 0
    reference.check(tree, ids, keyer=reference.TinyKeyer())
  if found := check(url).damage:
    return f"damaged: {found[0]}"
  return "new" if new else "old"


def kills(url: str, count: int, seed: int) -> dict[str, int]:
  """Kills so many compactions; how often the old and the new state was left."""
  rng, outcomes = np.random.default_rng(seed), collections.Counter()
  forgotten, found = 0, ""
  for _ in range(count):
    if forgotten * _SPAN > _TOKENS - 2 * _SPAN:
      break
    if not forgotten or found == "new":
      torture.result(torture.forked(prepare, url, forgotten))
      forgotten += 1
    child = torture.forked(_compact, url)
    time.sleep(np.exp(rng.uniform(*np.log(_WAITS))))
    os.kill(child[0], signal.SIGKILL)
    torture.result(child)
    found, _ = torture.result(torture.forked(compare, url))
    outcomes[found] += 1
    if found not in ("old", "new"):
      break
  return dict(outcomes)


if __name__ == "__main__":
  place = pathlib.Path(sys.argv[1]) / "t"
  print(kills(str(place), int(sys.argv[2]), int(sys.argv[3])))
