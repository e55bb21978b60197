"""MegaContextTree: bad input, damaged records and places that fail."""

import os
import pathlib
import subprocess
import sys

from marks import further
import numpy as np
import pytest

from mcjax.testing import hostile
from mcjax.testing.tiny_base import memory_url
from mcjax.testing.tree_reference import (
  BASE,
  VOCAB,
  TinyEncoder,
  check,
  create,
  peek,
  random_ids,
  reopen,
)
from mcjax.tree import check as tree_check
from mcjax.tree.store import RECORD_KEY, decode_record, encode_record
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError


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
  tree.close()
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
    ("version", 4, "format version 4, newer than 3"),
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
  check(peek(tmp_path / "t"), random_ids(0))


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {root!r})
from mcjax.testing.tree_reference import create, peek, random_ids, check
from mcjax.types import McjaxError
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
check(peek({url!r} + "/t"), random_ids(64))
"""


def test_a_disk_that_is_full(tmp_path):
  code = FULL_DISK.format(
    root=str(pathlib.Path(__file__).parents[2]), url=str(tmp_path)
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(done.stdout.splitlines()) == 2
  assert [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("part", [3, *further(0, 1, 2, 4, 5, 6)])
def test_malformed_records_are_told_in_one_line(tmp_path, part):
  """Every field lost, or of another kind, under a checksum that is right."""
  place = hostile.make_tree(tmp_path)
  bad = list(hostile.malformed(hostile.record_of(place)))[part::7]
  assert len(bad) > 60
  told = 0
  for what, record in bad:
    hostile.write_record(place, record)
    for use in (hostile.read_tree, tree_check.check):
      try:
        use(place)
      except McjaxError as error:
        assert "\n" not in str(error), what
        told += use is hostile.read_tree
  assert told > 0.8 * len(bad)
