"""Trees whose writes fail, one after the other."""

import functools

from kernel_faults import file_limit, no_permission
from marks import BUCKET_SLOWLY, further
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
from mcjax.tree.check import check as findings_of
from mcjax.tree.compaction import compact
from mcjax.types import McjaxError


@BUCKET_SLOWLY
@pytest.mark.parametrize("allowed", [
  *range(0, 14, 3), *further(*(n for n in range(14) if n % 3))])
def test_crash_at_any_write_of_a_commit(url, monkeypatch, allowed):
  ids = random_ids(36_000)
  tree = create(url)
  tree.append(ids[:1500])
  tree.commit({"n": 1})
  with monkeypatch.context() as patch:
    tree = reopen(url)
    FailingWrites(patch, allowed)
    tree = reopen(url)
    tree.record_access(1, np.arange(5))
    done = False
    try:
      tree.append(ids[1500:])
      tree.commit({"n": 2})
      done = True
    except McjaxError as error:
      assert "No space left" in str(error) and "\n" not in str(error)
      # The process goes on: what was appended before is still there.
      check(tree, ids[: tree.cursor])
  crashed = reopen(url)
  n = crashed.extra["n"]
  assert n == 2 or not done
  check(crashed, ids[: {1: 1500, 2: 36_000}[n]])
  crashed.append(ids[crashed.cursor : crashed.cursor + 4000])
  crashed.commit({"n": 3})
  check(peek(url), ids[: crashed.cursor])


def test_commit_can_be_tried_again(tmp_path, monkeypatch):
  tree, ids = create(tmp_path / "t"), random_ids(1500)
  tree.append(ids)
  with monkeypatch.context() as patch:
    FailingWrites(patch, 1)
    with pytest.raises(McjaxError, match="No space left"):
      tree.commit()
  tree.append(ids[:10])
  check(tree, np.concatenate([ids, ids[:10]]))
  assert peek(tmp_path / "t").cursor == 0


@BUCKET_SLOWLY
@pytest.mark.parametrize("allowed", [1, 2, 3, 4])
def test_crash_in_a_rebuild_keeps_the_old_gists(url, monkeypatch, allowed):
  ids, new = random_ids(34_000), TinyEncoder(seed=3)
  create(url).close()
  with monkeypatch.context() as patch:
    tree = reopen(url)
    tree.append(ids)
    tree.commit()
    FailingWrites(patch, allowed)
    with pytest.raises(McjaxError, match="No space"):
      tree.rebuild_gists(new)
  check(tree, ids)
  tree = reopen(url)
  check(tree, ids)
  tree.rebuild_gists(new)
  check(peek(url, new), ids, new)


def _amend(tree):
  index = np.array([3, 900])
  gists = np.ones((2, tree.d_model), np.float32)
  tree.amend_gists(index, gists, [(0, 8), (896, 904)])


_UPKEEP = {
  "gists": lambda tree: tree.rebuild_gists(TinyEncoder(seed=3)),
  "lens keys": lambda tree: tree.rebuild_lens_keys(TinyKeyer(seed=3)),
  "some gists": _amend,
  "files": lambda tree: compact(tree.url),
}


@pytest.mark.parametrize(
  "what", ["gists", "files", *further("lens keys", "some gists")])
def test_the_kernel_refuses_the_writes_of_upkeep(tmp_path, what):
  """A full disk or no permission, at any file: then it is done as a whole."""
  ids = random_ids(110_000 if what == "files" else 36_000)
  keyer, url = TinyKeyer(), tmp_path / "t"
  tree = create(url, keyer=keyer)
  tree.append(ids)
  tree.commit()
  if what == "files":
    tree.close()
  sizes = [p.stat().st_size for p in url.rglob("*") if p.is_file()]
  limits = [0, 100, 500, 1500, max(sizes) - 1]
  faults = [*(functools.partial(file_limit, limit) for limit in limits),
            functools.partial(no_permission, url)]
  failed = 0
  for fault in faults:
    done = False
    with fault():
      try:
        _UPKEEP[what](tree)
        done = True
      except McjaxError as error:
        assert "\n" not in str(error)
        failed += 1
    if done:
      break
    if what != "files":
      check(tree, ids, keyer=keyer)
    check(peek(url, keyer=keyer), ids, keyer=keyer)
  assert failed >= 4
  if not done:
    _UPKEEP[what](tree)
  tree.close()
  assert not findings_of(url).damage
  seen = peek(url, encoder=TinyEncoder(seed=3 if what == "gists" else 0),
              keyer=TinyKeyer(seed=3 if what == "lens keys" else 0))
  np.testing.assert_array_equal(seen.tokens(0, len(ids)), ids)
