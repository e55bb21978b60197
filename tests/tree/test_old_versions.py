"""Trees that were stored by earlier versions of the format."""

import json
import pathlib
import shutil

import numpy as np

from mcjax.testing.tree_reference import (
  TinyEncoder,
  TinyKeyer,
  check,
  peek,
  random_ids,
  reopen,
)
from mcjax.tree.store import RECORD_KEY

ARTEFACTS = pathlib.Path(__file__).parent / "artefacts"
ARTEFACT = ARTEFACTS / "tree_v1"


def artefact_ids():
  at = np.arange(66_000)
  return ((at % 97) + 97 * (at // 1000 % 2)).astype(np.int32)


def test_a_stored_tree_of_version_1_opens(tmp_path):
  shutil.copytree(ARTEFACT, tmp_path / "t")
  encoder, ids = TinyEncoder(d_model=4), artefact_ids()
  tree = reopen(tmp_path / "t", encoder)
  assert tree.extra == {"note": "format version 1"}
  check(tree, ids, encoder)
  assert tree.access_counts(1, 7, 8) == [2]
  tree.append(ids[:100])
  tree.commit()
  ids = np.concatenate([ids, ids[:100]])
  check(peek(tmp_path / "t", encoder), ids, encoder)
  record = json.loads((ARTEFACT / RECORD_KEY).read_text())
  assert record["version"] == 1 and "lens" not in record
  tree = reopen(tmp_path / "t", encoder, keyer=TinyKeyer())
  tree.append(ids[:100])  # a keyer alone makes no keys
  ids = np.concatenate([ids, ids[:100]])
  check(tree, ids, encoder)
  tree.rebuild_lens_keys(TinyKeyer())
  check(peek(tmp_path / "t", encoder), ids, encoder, keyer=TinyKeyer())


def test_a_stored_tree_of_version_2_opens(tmp_path):
  shutil.copytree(ARTEFACTS / "tree_v2", tmp_path / "t")
  encoder, ids = TinyEncoder(d_model=4), random_ids(9_000, seed=3)
  tree = reopen(tmp_path / "t", encoder, keyer=TinyKeyer())
  assert tree.extra == {"note": "format version 2"}
  assert [e["name"] for e in tree.journal.of("document")] == ["a.md"]
  check(tree, ids, encoder, keyer=TinyKeyer())
  tree.append(ids[:5])
  tree.commit()
  tree.close()
  ids = np.concatenate([ids, ids[:5]])
  check(peek(tmp_path / "t", encoder), ids, encoder, keyer=TinyKeyer())
