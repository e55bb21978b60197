"""Trees whose writes fail, one after the other."""

from marks import BUCKET_SLOWLY, further
import numpy as np
import pytest

from mcjax.testing.tree_reference import (
  FailingWrites,
  TinyEncoder,
  check,
  create,
  peek,
  random_ids,
  reopen,
)
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
