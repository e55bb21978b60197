"""MegaContextTree: contents, commits, crashes, and errors."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import uuid

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from tiny_base import further
from tree_reference import (
  BASE,
  VOCAB,
  FailingWrites,
  TinyEncoder,
  TinyKeyer,
  random_ids,
  reference_gists,
)

from mcjax import keys, tree_format
from mcjax.store import RECORD_KEY, decode_record, encode_record
from mcjax.tree import MegaContextTree
from mcjax.types import McjaxError

ARTEFACT = pathlib.Path(__file__).parent / "artefacts" / "tree_v1"


def memory_url():
  return f"memory://test-{uuid.uuid4()}/tree"


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
  return memory_url() if request.param == "memory" else str(tmp_path / "tree")


def create(url, encoder=None, **kwargs):
  kwargs = {"vocab_size": VOCAB, **BASE, **kwargs}
  return MegaContextTree.create(url, encoder=encoder or TinyEncoder(), **kwargs)


def reopen(url, encoder=None, **kwargs):
  return MegaContextTree.open(
    url, encoder=encoder or TinyEncoder(), **{**BASE, **kwargs}
  )


def round_trip(dtype):
  return lambda x: tree_format.unpack_gists(tree_format.pack_gists(x, dtype))


def check(tree, ids, encoder=None, dtype="bfloat16", keyer=None):
  """The tree holds exactly the history `ids`, by content."""
  encoder = encoder or TinyEncoder()
  assert tree.cursor == len(ids) == tree.num_nodes(0)
  np.testing.assert_array_equal(tree.tokens(0, len(ids)), ids)
  levels = reference_gists(encoder, ids, round_trip(dtype))
  assert tree.top_level == len(levels)
  assert tree.num_nodes(len(levels) + 1) == 0
  for level, gists in enumerate(levels, 1):
    assert tree.num_nodes(level) == len(gists) == len(ids) // 32**level
    np.testing.assert_array_equal(tree.gists(level, 0, len(gists)), gists)
    assert np.abs(gists).max(axis=1).min() > 0
    width = 32**level
    for index in {0, len(gists) // 2, len(gists) - 1}:
      start = max(0, index * width - keys.LOOKBACK)
      span = ids[None, start : (index + 1) * width]
      np.testing.assert_array_equal(
        tree.keys(level, index, index + 1), keys.sketch(span, level)
      )
  blocks = ids[: len(ids) // 32 * 32].reshape(-1, 32)
  held = [(blocks == token).any(axis=1).sum() for token in range(VOCAB)]
  np.testing.assert_array_equal(tree.block_frequency(np.arange(VOCAB)), held)
  if keyer is None:
    assert tree.lens_fingerprint is None
  else:
    assert tree.lens_fingerprint == keyer.fingerprint
    if levels:
      check_lens_keys(tree, keyer, blocks, levels[0])


def check_lens_keys(tree, keyer, blocks, gists):
  own = keyer.encode_keys(blocks.astype(np.int32), gists)
  for level in range(1, tree.top_level + 1):
    n = tree.num_nodes(level)
    rows = own
    if level > 1:
      below = own[: n * 32 ** (level - 1)].reshape(n, -1, keyer.key_dim)
      rows = np.concatenate([below.min(axis=1), below.max(axis=1)], axis=1)
    found = tree.lens_keys(level, 0, n)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, rows)


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
  check(reopen(url), np.concatenate([ids, ids[:50]]))
  assert reopen(url).extra == {"focus": [1, 2]}


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
  check(reopen(url), np.concatenate([ids[:100], ids[:3000]]))


@pytest.mark.parametrize("dtype", tree_format.GIST_DTYPES)
def test_gist_dtypes(dtype):
  url, ids = memory_url(), random_ids(1200)
  tree = create(url, gist_dtype=dtype)
  tree.append(ids)
  tree.commit()
  check(reopen(url), ids, dtype=dtype)


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
  check(reopen(url), ids)
  tree.commit()
  check(reopen(url), np.concatenate([ids, ids[:40]]))


def test_an_encoder_that_fails_leaves_the_tree_as_it_was():
  encoder = TinyEncoder()
  tree, ids = create(memory_url(), encoder), random_ids(1500)
  tree.append(ids)
  encoder.encode_gists = lambda gists, level: gists[:, 0] * np.nan
  with pytest.raises(McjaxError, match="tiny-0 .* level 2 .* not finite"):
    tree.append(ids)
  check(tree, ids)


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
  check(reopen(url), ids[: crashed.cursor])


def test_commit_can_be_tried_again(tmp_path, monkeypatch):
  tree, ids = create(tmp_path / "t"), random_ids(1500)
  tree.append(ids)
  with monkeypatch.context() as patch:
    FailingWrites(patch, 1)
    with pytest.raises(McjaxError, match="No space left"):
      tree.commit()
  tree.append(ids[:10])
  check(tree, np.concatenate([ids, ids[:10]]))
  assert reopen(tmp_path / "t").cursor == 0


def test_a_second_writer_is_refused(url):
  first, ids = create(url), random_ids(200)
  second = reopen(url)
  first.append(ids)
  first.commit()
  second.append(ids[:64])
  with pytest.raises(McjaxError, match="another process"):
    second.commit()
  check(reopen(url), ids)


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


@pytest.mark.parametrize("bad", [[-1], [VOCAB], [[1, 2]], [0.5]])
def test_bad_tokens(bad):
  tree = create(memory_url())
  with pytest.raises(McjaxError):
    tree.append(np.array(bad))
  assert tree.cursor == 0
  tree.append([])


def test_closed_tree_refuses():
  tree = create(memory_url())
  tree.close()
  tree.close()
  for use in (lambda: tree.append([1]), tree.commit, lambda: tree.tokens(0, 0)):
    with pytest.raises(McjaxError, match="closed"):
      use()


def test_out_of_range_reads():
  tree = create(memory_url())
  tree.append(random_ids(40))
  for read in (
    lambda: tree.gists(1, 0, 2),
    lambda: tree.gists(0, 0, 1),
    lambda: tree.keys(2, 0, 1),
    lambda: tree.tokens(0, 41),
  ):
    with pytest.raises(IndexError):
      read()


# What opening and creating refuse.


def test_open_refuses_missing_and_other_models(url):
  assert not MegaContextTree.exists(url)
  with pytest.raises(McjaxError, match="no tree"):
    reopen(url)
  create(url).close()
  assert MegaContextTree.exists(url)
  with pytest.raises(McjaxError, match=r"tiny \(base-1\).*other \(base-2\)"):
    reopen(url, base_fingerprint="base-2", base_name="other")
  with pytest.raises(McjaxError, match="tiny-0.*tiny-7"):
    reopen(url, TinyEncoder(seed=7))
  with pytest.raises(McjaxError, match="already holds a tree"):
    create(url)


def test_open_without_a_gistnet_reads_only(url):
  tree = create(url)
  tree.append(random_ids(64))
  tree.commit()
  tree = MegaContextTree.open(url, encoder=None, **BASE)
  assert tree.gists(1, 0, 2).shape == (2, 8)
  with pytest.raises(McjaxError, match="without a GistNet"):
    tree.append([1])


def test_create_refuses_a_folder_in_use(tmp_path):
  (tmp_path / "letter.txt").write_text("dear")
  with pytest.raises(McjaxError, match="not empty"):
    create(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
  "damage",
  [
    lambda raw: raw[: len(raw) // 2],
    lambda raw: b"",
    lambda raw: b"[]",
    lambda raw: raw.replace(b'"cursor": 64', b'"cursor": 32'),
  ],
)
def test_damaged_record(tmp_path, damage):
  tree = create(tmp_path / "t")
  tree.append(random_ids(64))
  tree.commit()
  path = tmp_path / "t" / RECORD_KEY
  damaged = damage(path.read_bytes())
  assert damaged != path.read_bytes()
  path.write_bytes(damaged)
  with pytest.raises(McjaxError, match="damaged"):
    reopen(tmp_path / "t")
  with pytest.raises(McjaxError, match="already holds"):
    create(tmp_path / "t")


def test_newer_format_and_foreign_record(tmp_path):
  create(tmp_path / "t")
  path = tmp_path / "t" / RECORD_KEY
  record = decode_record(path.read_bytes(), "t")
  for field, value, message in (
    ("version", 2, "format version 2, newer than 1"),
    ("format", "other", "not a tree"),
    ("keys", "learned-9", "learned-9"),
  ):
    path.write_bytes(encode_record({**record, field: value}))
    with pytest.raises(McjaxError, match=message):
      reopen(tmp_path / "t")


@pytest.mark.parametrize("lost", ["tokens", "gists", "keys"])
@pytest.mark.parametrize("how", ["removed", "cut", "flipped"])
def test_damaged_arrays_are_told(tmp_path, lost, how):
  tree = create(tmp_path / "t")
  tree.append(random_ids(1100))
  tree.commit()
  for path in (tmp_path / "t" / lost).rglob("*"):
    if path.is_file() and "c" in path.parts[-3:]:
      raw = bytearray(path.read_bytes())
      if how == "removed":
        path.unlink()
        continue
      if how == "flipped":
        raw[3] ^= 255
      path.write_bytes(raw[: len(raw) // 2] if how == "cut" else raw)
  with pytest.raises(McjaxError) as caught:
    tree = reopen(tmp_path / "t")
    tree.tokens(0, 1100)
    tree.gists(1, 0, 34)
    tree.keys(2, 0, 1)
  assert "\n" not in str(caught.value)


def test_places_that_cannot_be_written_stay_as_they_were(tmp_path):
  (tmp_path / "file").write_text("x")
  for place in (tmp_path / "file" / "tree", "/proc/mcjax/tree", "ftp://a/b"):
    with pytest.raises(McjaxError) as caught:
      create(place)
    assert "\n" not in str(caught.value)
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_read_only_folder(tmp_path):
  create(tmp_path / "t").close()
  (tmp_path / "t").chmod(0o500)
  tmp_path.chmod(0o500)
  try:
    with pytest.raises(McjaxError):
      create(tmp_path / "new" / "deep")
    tree = reopen(tmp_path / "t")
    tree.append(random_ids(64))
    with pytest.raises(McjaxError):
      tree.commit()
  finally:
    tmp_path.chmod(0o700)
    (tmp_path / "t").chmod(0o700)
  assert [p.name for p in tmp_path.iterdir()] == ["t"]
  check(reopen(tmp_path / "t"), random_ids(0))


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_tree import create, reopen, random_ids, check, McjaxError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(n):
  resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
limit(10)
try:
  create({url!r} + "/new/deep")
  raise SystemExit("created")
except McjaxError as error:
  print(error)
limit(2000)
tree = create({url!r} + "/t")
tree.append(random_ids(64)); tree.commit()
tree.append(random_ids(9000))
try:
  tree.commit()
  raise SystemExit("committed")
except McjaxError as error:
  print(error)
check(reopen({url!r} + "/t"), random_ids(64))
"""


def test_a_disk_that_is_full(tmp_path):
  code = FULL_DISK.format(
    tests=str(pathlib.Path(__file__).parent), url=str(tmp_path)
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(done.stdout.splitlines()) == 2
  assert [p.name for p in tmp_path.iterdir()] == ["t"]


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
  check(reopen(url), np.concatenate([ids, ids[:100]]))
  assert not any(k.startswith("gists/1/") for k in tree._store.sizes())


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
  check(reopen(url, new), ids, new)


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
  check(reopen(tmp_path / "t", encoder), ids, encoder)
  record = json.loads((ARTEFACT / RECORD_KEY).read_text())
  assert record["version"] == 1 and "lens" not in record
  tree = reopen(tmp_path / "t", encoder, keyer=TinyKeyer())
  tree.append(ids[:100])  # a keyer alone makes no keys
  ids = np.concatenate([ids, ids[:100]])
  check(tree, ids, encoder)
  tree.rebuild_lens_keys(TinyKeyer())
  check(reopen(tmp_path / "t", encoder), ids, encoder, keyer=TinyKeyer())


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


# Lens keys.


def lens_files(tree):
  return {k.split("/")[1] for k in tree._store.sizes() if k[:5] == "lens/"}


def lens_tree(url, ids, keyer):
  tree = create(url, keyer=keyer)
  tree.append(ids)
  tree.commit({"n": 1})
  return tree


def test_a_tree_without_a_keyer_stores_nothing_of_lens_keys(url):
  tree = create(url)
  tree.append(random_ids(1100))
  tree.commit()
  assert not lens_files(tree) and tree.nbytes_on_disk()["lens"] == 0
  record = decode_record(tree._store.read_record()[0], url)
  assert record["lens"] is None and "lens_epochs" not in record
  with pytest.raises(McjaxError, match="no lens keys.*rekey"):
    tree.lens_keys(1, 0, 1)
  with pytest.raises(IndexError):
    tree.lens_keys(0, 0, 1)


@pytest.mark.parametrize("dtype", tree_format.GIST_DTYPES)
def test_lens_keys_in_pieces_equal_those_at_once(url, dtype):
  ids, keyer = random_ids(70_000), TinyKeyer(key_dim=3)
  tree, at = create(url, gist_dtype=dtype, keyer=keyer), 0
  for n in (7, 25, 1, 1000, 40_000, 28_967):
    tree.append(ids[at : at + n])
    at += n
  check(tree, ids, dtype=dtype, keyer=keyer)
  tree.commit()
  tree.close()
  check(reopen(url), ids, dtype=dtype, keyer=keyer)
  tree = reopen(url, keyer=keyer)
  assert tree.nbytes_on_disk()["lens"] < 2400 * 3 + 8192
  tree.append(ids[:5000])
  tree.commit()
  ids = np.concatenate([ids, ids[:5000]])
  check(reopen(url, keyer=keyer), ids, dtype=dtype, keyer=keyer)


@settings(max_examples=25, deadline=None)
@given(
  st.lists(
    st.tuples(
      st.sampled_from(
        ["append", "commit", "transient", "crash", "reopen", "rebuild"]
      ),
      st.sampled_from([0, 1, 31, 32, 100, 1023, 1500]),
      st.sampled_from([0, 0, 0, 1, None]),
    ),
    max_size=14,
  )
)
def test_any_history_of_lens_keys_equals_the_reference(steps):
  """Each reopening has a keyer of some seed, or none."""
  url, pool, encoder = memory_url(), random_ids(40_000), TinyEncoder()
  keyers = {0: TinyKeyer(), 1: TinyKeyer(6, 1), None: None}
  tree, own = create(url, keyer=keyers[0]), 0  # the seed of its keyer
  now = committed = pool[:0], 0  # tokens, the seed of its keys
  at = 0
  for step, n, seed in steps:
    new = pool[at : at + n]
    at += n
    ids, held = now
    grown = np.concatenate([ids, new]), held if held == own or not n else None
    if step == "append":
      tree.append(new)
      now = grown
    elif step == "transient":
      with tree.transient():
        tree.append(new)
        check(tree, grown[0], encoder, keyer=keyers[grown[1]])
    elif step == "rebuild" and seed is not None:
      tree.rebuild_lens_keys(keyers[seed])
      now = committed = ids, seed
      own = seed
    else:
      if step != "crash":
        tree.commit()
        committed = now
      if step != "commit":
        tree, own, now = reopen(url, keyer=keyers[seed]), seed, committed
    check(tree, now[0], encoder, keyer=keyers[now[1]])


@pytest.mark.parametrize("keyer", [None, TinyKeyer(4, 1), TinyKeyer(5, 0)])
def test_the_first_append_without_its_keyer_drops_lens_keys(url, keyer):
  ids, own = random_ids(2000), TinyKeyer()
  lens_tree(url, ids, own).close()
  tree = reopen(url, keyer=keyer)
  check(tree, ids, keyer=own)
  tree.commit()
  with tree.transient():
    tree.append(ids[:1])
    assert tree.lens_fingerprint is None
  check(tree, ids, keyer=own)
  tree.append([])
  check(reopen(url, keyer=own), ids, keyer=own)
  tree.append(ids[:1])
  check(tree, np.append(ids, ids[0]))
  check(reopen(url), ids, keyer=own)  # not committed yet
  tree.commit()
  assert not lens_files(tree)
  ids = np.append(ids, ids[0])
  check(reopen(url, keyer=own), ids)
  tree = reopen(url)
  tree.rebuild_lens_keys(own)
  assert lens_files(tree) == {"1"}  # no epoch is used twice
  check(reopen(url), ids, keyer=own)


def test_without_a_gistnet_lens_keys_are_read():
  url, ids, keyer = memory_url(), random_ids(1100), TinyKeyer()
  lens_tree(url, ids, keyer).close()
  tree = MegaContextTree.open(url, encoder=None, **BASE)
  check(tree, ids, keyer=keyer)
  tree.rebuild_lens_keys(TinyKeyer(7, 2))
  check(reopen(url), ids, keyer=TinyKeyer(7, 2))


def test_a_keyer_that_fails_leaves_the_tree_as_it_was():
  keyer, ids = TinyKeyer(), random_ids(1500)
  tree = lens_tree(memory_url(), ids, keyer)
  keyer.encode_keys = lambda tokens, gists: np.zeros((len(tokens), 5), np.int8)
  with pytest.raises(ValueError, match=r"int8\[2, 5\], not int8\[2, 4\]"):
    tree.append(ids[:40])
  check(tree, ids, keyer=TinyKeyer())


def test_rebuild_lens_keys(url):
  ids, new = random_ids(70_000), TinyKeyer(6, 3)
  tree = lens_tree(url, ids, TinyKeyer())
  tree.append(ids[:100])
  ids = np.concatenate([ids, ids[:100]])
  tree.rebuild_lens_keys(new)
  check(tree, ids, keyer=new)
  assert lens_files(tree) == {"1"}
  check(reopen(url), ids, keyer=new)
  tree.append(ids[:3000])  # the new keyer goes on
  tree.commit()
  ids = np.concatenate([ids, ids[:3000]])
  check(reopen(url), ids, keyer=new)
  tree.rebuild_lens_keys(TinyKeyer())
  assert lens_files(tree) == {"2"}
  check(reopen(url), ids, keyer=TinyKeyer())


def test_rebuild_lens_keys_of_an_empty_tree(url):
  tree, ids = create(url), random_ids(1100)
  tree.rebuild_lens_keys(TinyKeyer())
  tree.append(ids)
  tree.commit()
  check(reopen(url), ids, keyer=TinyKeyer())


def test_rebuild_gists_makes_lens_keys_anew_or_drops_them(url):
  ids, keyer = random_ids(34_000), TinyKeyer()
  tree = lens_tree(url, ids, keyer)
  tree.rebuild_gists(TinyEncoder(seed=3))
  check(tree, ids, TinyEncoder(seed=3), keyer=keyer)
  tree = reopen(url, TinyEncoder(seed=3))
  check(tree, ids, TinyEncoder(seed=3), keyer=keyer)
  assert lens_files(tree) == {"1"}
  tree.rebuild_gists(TinyEncoder())
  check(tree, ids)
  assert not lens_files(tree)
  check(reopen(url), ids)


@pytest.mark.parametrize("kind", ["gists", "lens"])
@pytest.mark.parametrize("allowed", [
  *range(0, 11, 3), *further(*(n for n in range(11) if n % 3))])
def test_crash_in_a_rebuild_keeps_the_old_lens_keys(monkeypatch, kind, allowed):
  url, ids, keyer = memory_url(), random_ids(34_000), TinyKeyer()
  rebuild = {
    "gists": lambda tree: tree.rebuild_gists(TinyEncoder(seed=3)),
    "lens": lambda tree: tree.rebuild_lens_keys(TinyKeyer(6, 3)),
  }[kind]
  lens_tree(url, ids, keyer).close()
  done = False
  with monkeypatch.context() as patch:
    tree = reopen(url, keyer=keyer)
    FailingWrites(patch, allowed)
    try:
      rebuild(tree)
      done = True
    except McjaxError as error:
      assert "No space" in str(error)
      check(tree, ids, keyer=keyer)
  if not done:
    assert lens_files(tree) == {"0"}
    tree = reopen(url, keyer=keyer)
    check(tree, ids, keyer=keyer)
    rebuild(tree)
  assert lens_files(tree) == {"1"}
  if kind == "gists":
    encoder = TinyEncoder(seed=3)
    check(reopen(url, encoder), ids, encoder, keyer=keyer)
  else:
    check(reopen(url), ids, keyer=TinyKeyer(6, 3))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("allowed", [
  *range(0, 14, 3), *further(*(n for n in range(14) if n % 3))])
def test_crash_at_any_write_of_a_commit_with_lens_keys(
  monkeypatch, allowed, own
):
  url, ids, keyer = memory_url(), random_ids(36_000), TinyKeyer()
  lens_tree(url, ids[:1500], keyer).close()
  done = False
  with monkeypatch.context() as patch:
    FailingWrites(patch, allowed)
    tree = reopen(url, keyer=keyer if own else None)
    try:
      tree.append(ids[1500:])
      tree.commit({"n": 2})
      done = True
    except McjaxError:
      assert tree.cursor in (1500, 36_000)
      held = keyer if own or tree.cursor == 1500 else None
      check(tree, ids[: tree.cursor], keyer=held)
  crashed = reopen(url, keyer=keyer)
  n = crashed.extra["n"]
  assert n == 2 or not done
  held = keyer if own or n == 1 else None
  check(crashed, ids[: crashed.cursor], keyer=held)
  crashed.append(ids[crashed.cursor :])
  crashed.commit({"n": 3})
  check(reopen(url), ids, keyer=held)


def test_damaged_lens_keys_are_told(tmp_path):
  lens_tree(tmp_path / "t", random_ids(1100), TinyKeyer()).close()
  shutil.rmtree(tmp_path / "t" / "lens")
  with pytest.raises(McjaxError, match="could not"):
    reopen(tmp_path / "t")
