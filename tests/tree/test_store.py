"""Store, Column, AccessCounts and TokenFrequency."""

import uuid

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.tree.columns import Column, flush_columns
from mcjax.tree.counts import AccessCounts, TokenFrequency
from mcjax.tree.store import ArraySpec, Store, decode_record, encode_record
from mcjax.types import McjaxError

SPEC = ArraySpec("float32", 3, 2, 8)


def new_store():
  return Store(f"memory://store-{uuid.uuid4()}")


def test_record_is_written_only_over_the_generation_that_was_read():
  store = new_store()
  value, missing = store.read_record()
  assert value is None
  first = store.write_record(b"a", missing)
  with pytest.raises(McjaxError, match="another process"):
    store.write_record(b"b", missing)
  store.write_record(b"c", first)
  assert store.read_record()[0] == b"c"
  with pytest.raises(McjaxError, match="another process"):
    store.write_record(b"d", first)


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_record_checksum(cut):
  raw = encode_record({"cursor": 5, "extra": {"é": [1.5, None]}})
  assert decode_record(raw, "u") == {"cursor": 5, "extra": {"é": [1.5, None]}}
  with pytest.raises(McjaxError, match="damaged"):
    decode_record(raw[:cut], "u")
  with pytest.raises(McjaxError, match="damaged"):
    decode_record(raw.replace(b"5", b"6", 1), "u")


@pytest.mark.parametrize("url", [
  "", "ftp://host/x", "http://host/x", "gs://", "s3://", "a\nb", "a\0b",
  "a\udcff", b"\xff", None, 7])
def test_urls_that_are_refused(url):
  with pytest.raises(McjaxError) as caught:
    Store(url)
  assert str(caught.value).isprintable()


def test_file_urls_and_paths_are_the_same_place(tmp_path):
  store = Store(f"file://{tmp_path}/t")
  store.write_record(b"x", store.read_record()[1])
  assert Store(tmp_path / "t").read_record()[0] == b"x"
  assert store.url == str(tmp_path / "t")
  assert store.sizes() == {"mcjax_tree.json": 1, "mcjax_tree.copy.json": 1}


def test_delete_takes_one_prefix_only():
  store = new_store()
  for path in ("a/1", "a/2", "b"):
    store.array(path, SPEC, create=True)
  store.delete("a/")
  assert not store.has_array("a/1") and store.has_array("b")


@pytest.mark.parametrize("recent", [0, 2])
@settings(max_examples=40, deadline=None)
@given(
  steps=st.lists(
    st.tuples(
      st.sampled_from(["append", "flush", "shards", "undo", "reopen"]),
      st.integers(0, 20),
    ),
    max_size=20,
  )
)
def test_column_equals_a_list(recent, steps):
  store = new_store()
  column = Column(store, "x", SPEC, 0, recent=recent)
  rows, saved = np.zeros((0, 3)), 0
  for step, n in steps:
    if step in ("append", "undo"):
      before, state = rows, column.snapshot()
      new = np.random.default_rng(len(rows)).standard_normal((n, 3))
      column.append(new)
      rows = np.concatenate([rows, new])
      if step == "undo":
        flush_columns([column], "u", everything=bool(n % 2))
        _assert_reads(column, rows)
        column.restore(state)
        rows = before
    elif step == "reopen":
      flush_columns([column], "u", everything=True)
      column = Column(store, "x", SPEC, len(rows), recent=recent)
      saved = len(rows)
    else:
      flush_columns([column], "u", everything=step == "flush")
      assert step == "shards" or column.flushed == len(rows)
    assert column.length == len(rows) >= saved
    _assert_reads(column, rows)


def _assert_reads(column, rows):
  for low, high in ((len(rows) // 3, len(rows)), *(
      (at, min(at + 2, len(rows))) for at in range(0, len(rows), 2))):
    found = column.read(low, high)
    np.testing.assert_array_equal(found, rows[low:high].astype(np.float32))


def test_recent_chunks_are_read_once(monkeypatch):
  store, rows = new_store(), np.arange(30).reshape(10, 3)
  column = Column(store, "x", SPEC, 0)
  column.append(rows)
  flush_columns([column], "u", everything=True)
  column = Column(store, "x", SPEC, 10, recent=2)
  asked, read = [], column._read_array
  monkeypatch.setattr(
    column, "_read_array", lambda a, b: asked.append((a, b)) or read(a, b))
  for _ in range(3):
    np.testing.assert_array_equal(column.read(1, 2), rows[1:2])
  assert len(asked) == 1
  column.read(1, 2)[:] = 99  # a copy
  np.testing.assert_array_equal(column.read(1, 2), rows[1:2])


def test_column_keeps_little_in_memory_and_copies_what_it_gets():
  column = Column(new_store(), "x", SPEC, 0)
  row = np.ones((1, 3), np.float32)
  for _ in range(1000):
    column.append(row)
  assert len(column._tail) <= 10
  row[:] = 7
  assert (column.read(0, 1000) == 1).all()
  flush_columns([column], "u", everything=False)
  assert column.flushed == 1000 and not column._tail
  with pytest.raises(IndexError):
    column.read(0, 1001)


@settings(max_examples=40, deadline=None)
@given(
  st.lists(
    st.one_of(
      st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=30),
      st.sampled_from(["flush", "undo"]),
    ),
    max_size=8,
  )
)
def test_access_counts_equal_a_table(steps):
  counts, table = AccessCounts(new_store()), np.zeros((4, 41), int)
  for step in steps:
    if step == "flush":
      counts.flush(lambda level: 41)
    elif step == "undo":
      state = counts.snapshot()
      counts.add(np.array([1, 2]), np.array([3, 3]))
      counts.restore(state)
    elif step:
      level, index = np.array(step).T
      counts.add(level, index)
      np.add.at(table, (level, index), 1)
    for level in range(4):
      np.testing.assert_array_equal(counts.read(level, 2, 41), table[level, 2:])


def test_access_counts_flush_complete_nodes_and_saturate():
  store = new_store()
  counts = AccessCounts(store)
  counts.add(np.array([1, 1]), np.array([3, 9]))
  counts.flush(lambda level: 5)
  assert AccessCounts(store).read(1, 0, 10).tolist() == [0] * 3 + [1] + [0] * 6
  assert counts.read(1, 9, 10) == [1]
  store.array("access/L2", AccessCounts.SPEC, create=True)[0].write(
    2**32 - 1
  ).result()
  counts.add(np.array([2]), np.array([0]))
  assert counts.read(2, 0, 1) == [2**32 - 1]
  counts.flush(lambda level: 5)
  assert AccessCounts(store).read(2, 0, 1) == [2**32 - 1]


def test_token_frequency_alternates_slots():
  store = new_store()
  rng = np.random.default_rng(0)
  counts = TokenFrequency(store, 50, slot=0, blocks=0)
  expected, record = np.zeros(50, int), {"slot": 0, "blocks": 0}
  for _ in range(4):
    blocks = rng.integers(0, 50, (TokenFrequency.EVERY, 32))
    counts.add(blocks)
    expected += [(blocks == token).any(axis=1).sum() for token in range(50)]
    new = counts.save()
    assert new["slot"] != record["slot"]
    if record["blocks"]:  # a crash before the record is written
      TokenFrequency(store, 50, **record)
    counts.saved(new)
    record = new
    stored = TokenFrequency(store, 50, **record)
    np.testing.assert_array_equal(stored.counts, expected)
  counts.add(blocks[:3])
  assert counts.save() == record


@pytest.mark.parametrize("existing", ["", "a", "a/b"])
def test_what_a_failed_creation_leaves(tmp_path, existing):
  (tmp_path / existing).mkdir(parents=True, exist_ok=True)
  before = sorted(tmp_path.rglob("*"))
  store = Store(tmp_path / "a" / "b")
  made = store.make_folder()
  (tmp_path / "a" / "b" / "mcjax_tree.json_1.__lock").write_text("")
  store.unmake(made, locked=True)
  assert sorted(tmp_path.rglob("*")) == before
  made = store.make_folder()
  store.write_record(b"another one's", store.read_record()[1])
  store.unmake(made, locked=True)
  assert store.read_record()[0] == b"another one's"
