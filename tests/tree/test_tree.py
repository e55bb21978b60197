"""MegaContextTree: what it holds, and what that costs."""

import resource

from hypothesis import given, settings
from hypothesis import strategies as st
from marks import EVERYWHERE
import numpy as np
import pytest

from mcjax.testing.tiny_base import memory_url
from mcjax.testing.tree_reference import (
  TinyEncoder,
  TinyKeyer,
  check,
  create,
  peek,
  random_ids,
  reopen,
  round_trip,
)
from mcjax.tree import format as tree_format
from mcjax.tree import lexical_keys as keys
from mcjax.tree.store import RECORD_KEY
from mcjax.types import McjaxError


@EVERYWHERE
def test_append_is_readable_at_once_and_durable_after_commit(url):
  ids = random_ids(2100)
  tree = create(url)
  tree.append(ids)
  check(tree, ids)
  assert tree.committed == 0
  tree.commit({"focus": [1, 2]})
  tree.close()
  tree = reopen(url)
  check(tree, ids)
  assert tree.extra == {"focus": [1, 2]} and tree.committed == 2100
  tree.append(ids[:50])
  tree.commit()
  check(peek(url), np.concatenate([ids, ids[:50]]))
  assert peek(url).extra == {"focus": [1, 2]}


@EVERYWHERE
def test_uncommitted_appends_vanish(url):
  ids = random_ids(70_000)
  tree = create(url)
  tree.append(ids[:100])
  tree.commit()
  tree.append(ids[100:])  # long enough to reach the arrays
  tree.close()
  tree = reopen(url)
  check(tree, ids[:100])
  tree.append(ids[:3000])
  tree.commit()
  check(peek(url), np.concatenate([ids[:100], ids[:3000]]))


@pytest.mark.parametrize("dtype", tree_format.GIST_DTYPES)
def test_gist_dtypes(dtype):
  url, ids = memory_url(), random_ids(1200)
  tree = create(url, gist_dtype=dtype)
  tree.append(ids)
  tree.commit()
  check(peek(url), ids, dtype=dtype)


def test_int8_error_is_below_half_a_step():
  gists = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
  gists[0] = 0
  error = np.abs(round_trip("int8")(gists) - gists).max(axis=1)
  assert (error <= np.abs(gists).max(axis=1) / 254 * 1.001).all()


def test_one_encoder_call_per_level_and_append():
  encoder = TinyEncoder()
  tree = create(memory_url(), encoder)
  tree.append(random_ids(64))
  assert encoder.calls == [(1, 2)]
  tree.append(random_ids(31))
  assert encoder.calls == [(1, 2)]  # no gist of an incomplete block
  encoder.calls.clear()
  tree.append(random_ids(2048))
  assert encoder.calls == [(1, 64), (2, 2)]
  encoder.calls.clear()
  tree.append(random_ids(40_000))
  assert encoder.calls == [(1, 1250), (2, 39), (3, 1)]


@settings(max_examples=25, deadline=None)
@given(
  st.lists(
    st.tuples(
      st.sampled_from(["append", "commit", "transient", "crash", "reopen"]),
      st.sampled_from([0, 1, 5, 31, 32, 33, 64, 100, 1023, 1500]),
    ),
    max_size=14,
  ),
  st.integers(0, 5),
)
def test_any_history_equals_the_reference(steps, seed):
  url, pool = memory_url(), random_ids(40_000, seed)
  tree = create(url)
  ids, committed, at = pool[:0], pool[:0], 0
  for step, n in steps:
    new = pool[at : at + n]
    at += n
    if step == "append":
      tree.append(new)
      ids = np.concatenate([ids, new])
    elif step == "commit":
      tree.commit()
      committed = ids
    elif step == "transient":
      with tree.transient():
        tree.append(new)
        check(tree, np.concatenate([ids, new]))
    else:
      if step == "reopen":
        tree.commit()
        committed = ids
        tree.close()
      tree, ids = reopen(url), committed
    check(tree, ids)


def test_tokens_one_at_a_time():
  tree, ids = create(memory_url()), random_ids(1100)
  for token in ids:
    tree.append([int(token)])
  check(tree, ids)


def test_levels_three_and_four_have_the_keys_of_their_tokens():
  ids = np.tile(random_ids(4096), 256)  # 32**4 tokens
  tree = create(memory_url(), TinyEncoder(d_model=2))
  tree.append(ids)
  assert tree.top_level == 4
  for level in (3, 4):
    np.testing.assert_array_equal(
      tree.keys(level, 0, 1), keys.sketch(ids[None, : 32**level], level)
    )
  with tree.transient():
    tree.append(ids[:2000])
  assert tree.cursor == 32**4


def test_transient_changes_nothing_durable(tmp_path):
  url, ids = str(tmp_path / "t"), random_ids(1000)
  tree = create(url)
  tree.append(ids)
  tree.commit({"a": 1})
  tree.append(ids[:40])
  tree.record_access(1, np.array([3]))
  before = (tmp_path / "t" / RECORD_KEY).read_bytes()
  with pytest.raises(RuntimeError), tree.transient():
    tree.append(random_ids(80_000, 1))
    tree.record_access(np.array([2, 1]), np.array([0, 3]))
    with pytest.raises(McjaxError, match="transient"):
      tree.commit()
    with tree.transient():
      tree.append(ids[:7])
    assert tree.cursor == 81_040
    raise RuntimeError("stop")
  check(tree, np.concatenate([ids, ids[:40]]))
  assert tree.access_counts(1, 3, 4) == [1]
  assert (tmp_path / "t" / RECORD_KEY).read_bytes() == before
  check(peek(url), ids)
  tree.commit()
  check(peek(url), np.concatenate([ids, ids[:40]]))


def test_an_encoder_that_fails_leaves_the_tree_as_it_was():
  encoder = TinyEncoder()
  tree, ids = create(memory_url(), encoder), random_ids(1500)
  tree.append(ids)
  encoder.encode_gists = lambda gists, level: gists[:, 0] * np.nan
  with pytest.raises(McjaxError, match="tiny-0 .* level 2 .* not finite"):
    tree.append(ids)
  check(tree, ids)


def test_access_counts(url):
  tree = create(url)
  tree.append(random_ids(3000))
  tree.record_access(np.array([1, 1, 1, 2]), np.array([5, 5, 90, 1]))
  tree.record_access(0, np.array([7]))
  np.testing.assert_array_equal(tree.access_counts(1, 4, 7), [0, 2, 0])
  tree.commit()
  tree.record_access(1, np.array([5]))
  tree.append(random_ids(64))
  tree.record_access(1, np.array([94]))
  tree.close()  # counts of committed nodes stay, that of node 94 goes
  tree = reopen(url)
  np.testing.assert_array_equal(tree.access_counts(1, 4, 7), [0, 3, 0])
  assert tree.access_counts(2, 1, 2) == [1] == tree.access_counts(0, 7, 8)
  tree.append(random_ids(64))
  assert tree.access_counts(1, 94, 95) == [0]
  assert tree.access_counts(1, 0, 95).dtype == np.uint32
  with pytest.raises(IndexError):
    tree.record_access(1, np.array([tree.num_nodes(1)]))


@pytest.mark.parametrize("keyer", [None, TinyKeyer()])
def test_reads_are_counted_and_do_not_grow_with_the_history(keyer):
  tree = create(memory_url(), keyer=keyer)
  costs = []
  for _ in range(3):
    tree.append(random_ids(65_536))
    before = tree.reads
    tree.append(random_ids(32))
    tree.tokens(0, 64)
    tree.gists(1, 5, 9)
    tree.keys(2, 0, 2)
    if keyer is not None:
      tree.lens_keys(1, 3, 6)
    costs.append({kind: tree.reads[kind] - n for kind, n in before.items()})
    tree.append(random_ids(992))
  assert costs[0] == costs[1] == costs[2]
  assert costs[0] == {
    "tokens": 64, "gists": 4, "keys": 2, "access": 0,
    "lens": 3 if keyer else 0, "ingest": 64 if keyer else 32,
  }  # fmt: skip


def test_bytes_on_disk(url):
  tree = create(url)
  tree.append(random_ids(70_000))
  tree.record_access(1, np.array([0]))
  tree.commit()
  size = tree.nbytes_on_disk()
  assert all(size[k] > 0 for k in ("tokens", "gists", "keys", "access"))
  assert 2187 * 16 < size["gists"] < 2300 * 16 + 8192
  assert size["tokens"] < 2 * 70_000


def test_a_million_tokens_are_few_files_and_small_appends_small_writes(
  tmp_path,
):
  tree = create(tmp_path / "t", TinyEncoder(d_model=16))
  tree.append(np.tile(random_ids(10_000), 100))
  tree.commit()
  files = [p for p in (tmp_path / "t").rglob("*") if p.is_file()]
  assert len(files) < 300
  stamps = {p: p.stat().st_mtime_ns for p in files}
  tree.append(random_ids(50))
  tree.commit()
  files = [p for p in (tmp_path / "t").rglob("*") if p.is_file()]
  changed = [p for p in files if stamps.get(p) != p.stat().st_mtime_ns]
  assert sum(p.stat().st_size for p in changed) < 200_000


def test_wide_vocabulary():
  url, ids = memory_url(), np.array([5, 100_000, 199_999] * 40)
  tree = create(url, TinyTable(), vocab_size=200_000)
  tree.append(ids)
  tree.commit()
  tree = reopen(url, TinyTable())
  np.testing.assert_array_equal(tree.tokens(0, 120), ids)


class TinyTable(TinyEncoder):
  """Ids of any size."""

  def encode_tokens(self, token_ids):
    return super().encode_tokens(token_ids % 2**16)


@EVERYWHERE
def test_rebuild_gists(url):
  ids, new = random_ids(70_000), TinyEncoder(d_model=6, seed=3)
  tree = create(url)
  tree.append(ids)
  tree.rebuild_gists(new)
  check(tree, ids, new)
  with pytest.raises(McjaxError, match="tiny-3.*tiny-0"):
    reopen(url)
  tree = reopen(url, new)
  check(tree, ids, new)
  tree.append(ids[:100])
  tree.rebuild_gists(TinyEncoder())
  check(peek(url), np.concatenate([ids, ids[:100]]))
  assert not any(k.startswith("gists/1/") for k in tree._store.sizes())


def test_memory_is_bounded_in_a_long_append(tmp_path):
  tree = create(tmp_path / "t", TinyEncoder(d_model=16))
  ids = np.tile(random_ids(5000), 100)
  tree.append(ids)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for _ in range(6):
    tree.append(ids)
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  held = sum(
    part.nbytes
    for column in [tree._levels.tokens, *tree._levels._columns.values()]
    for part in column._tail
  )
  assert held < 8 << 20 and (after - before) << 10 < 64 << 20
