"""Gists that are replaced one by one: atomically, all else as it was."""

import numpy as np
import pytest

from mcjax.testing.tree_reference import (
  FailingWrites,
  TinyEncoder,
  TinyKeyer,
  check,
  create,
  peek,
  random_ids,
  reopen,
)
from mcjax.types import McjaxError

_IDS = random_ids(34_000)
_INDEX = np.array([900, 3, 1019])


def amended(tree, seed=0):
  rng = np.random.default_rng(seed)
  gists = rng.normal(size=(len(_INDEX), tree.d_model)).astype(np.float32)
  tree.amend_gists(_INDEX, gists, [(896, 904), (0, 8), (1016, 1024)])
  return tree.as_stored(gists)


def levels(tree):
  return [tree.gists(level, 0, tree.num_nodes(level))
          for level in range(1, tree.top_level + 1)]


@pytest.mark.parametrize("gist_dtype", ["bfloat16", "int8"])
def test_amended_gists_are_stored_and_nothing_else_changes(url, gist_dtype):
  keyer = TinyKeyer()
  tree = create(url, keyer=keyer, gist_dtype=gist_dtype)
  tree.append(_IDS)
  before, keys = levels(tree), tree.lens_keys(1, 0, tree.num_nodes(1))
  gists = amended(tree)
  for seen in (tree, peek(url, keyer=keyer), reopen(url, keyer=keyer)):
    expected = [g.copy() for g in before]
    expected[0][_INDEX] = gists
    for found, right in zip(levels(seen), expected, strict=True):
      np.testing.assert_array_equal(found, right)
    np.testing.assert_array_equal(
      seen.lens_keys(1, 0, seen.num_nodes(1)), keys)
    np.testing.assert_array_equal(seen.tokens(0, seen.cursor), _IDS)
    assert seen.refined == [(0, 8), (896, 904), (1016, 1024)]
  assert not any(k.startswith("gists/0/") for k in tree._store.sizes())


def test_a_tree_goes_on_after_amending_and_a_new_gistnet_forgets_it(url):
  tree = create(url)
  tree.append(_IDS[:33_000])
  gists = amended(tree)
  tree.append(_IDS[33_000:])
  tree.commit()
  tree = reopen(url)
  np.testing.assert_array_equal(tree.gists(1, 3, 4)[0], gists[1])
  assert tree.num_nodes(1) == len(_IDS) // 32
  amended(tree, seed=1)
  tree.rebuild_gists(TinyEncoder(seed=3))
  assert tree.refined == []
  check(tree, _IDS, TinyEncoder(seed=3))


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_crash_while_amending_keeps_the_old_gists(url, monkeypatch, allowed):
  tree = create(url)
  tree.append(_IDS)
  tree.commit()
  with monkeypatch.context() as patch:
    FailingWrites(patch, allowed)
    with pytest.raises(McjaxError, match="No space"):
      amended(tree)
  check(tree, _IDS)
  tree = reopen(url)
  check(tree, _IDS)
  assert tree.refined == []


def test_wrong_gists_are_refused():
  tree = create("memory://amend/wrong")
  tree.append(_IDS[:320])
  with pytest.raises(McjaxError, match="not finite"):
    tree.amend_gists(np.array([1]), np.full((1, tree.d_model), np.nan), [])
  with pytest.raises(IndexError):
    tree.amend_gists(np.array([10]), np.zeros((1, tree.d_model)), [])
