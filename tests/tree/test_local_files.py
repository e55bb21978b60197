"""What is no plain file in a tree's folder: told, never read or followed."""

import os
import shutil
import time

from marks import further
import numpy as np
import pytest

from mcjax.runtime.telemetry import peak_memory_mib
from mcjax.testing import corruption
from mcjax.testing.tree_reference import (
  TinyEncoder,
  TinyKeyer,
  create,
  peek,
  random_ids,
  reopen,
)
from mcjax.tree import inspection
from mcjax.tree.check import check
from mcjax.tree.lock import LOCK_NAME, OWNER_NAME
from mcjax.tree.repair import repair
from mcjax.tree.store import COPY_KEY, RECORD_KEY, Store
from mcjax.types import McjaxError

WAYS = ("pipe", "file", "folder", "device")
# A file and a folder of each part of a tree.
PLACES = ("tokens/c/0", "tokens", "gists/0/L1/c/5/0", "gists/0",
          "keys/L2/zarr.json", "lens/0/L1/sums", "journal/c/0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A tree's folder, and what is in it."""
  folder = tmp_path_factory.mktemp("whole") / "t"
  tree = create(folder, keyer=TinyKeyer())
  tree.append(random_ids(45_000))
  tree.journal.add("note", text="x" * 5000)
  tree.record_access(np.array([1, 2]), np.array([0, 0]))
  tree.commit()
  tree.close()
  return folder, read(folder)


@pytest.fixture
def place(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "t")
  return tmp_path / "t"


@pytest.fixture
def outside(tmp_path):
  """What a symlink could lead to; nothing of it may change."""
  folder = tmp_path / "outside"
  for key in ("c/0/0", "L1/c/0/0", "zarr.json"):
    (folder / key).parent.mkdir(parents=True, exist_ok=True)
    (folder / key).write_bytes(b"mine")

  def content():
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

  before = content()
  yield folder
  assert content() == before


def put(way, path, outside):
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
  if way == "pipe":
    os.mkfifo(path)
  else:
    target = {"file": outside / "zarr.json", "folder": outside,
              "device": "/dev/zero"}[way]
    path.symlink_to(target)
  return "a pipe" if way == "pipe" else "a symlink"


def told(call):
  """The one line of an error that costs little time and memory."""
  before = time.process_time(), peak_memory_mib()
  with pytest.raises(McjaxError) as caught:
    call()
  assert time.process_time() - before[0] < 2
  assert peak_memory_mib() - before[1] < 100
  assert "\n" not in str(caught.value)
  return str(caught.value)


def read(place):
  return corruption.contents(peek(place, keyer=TinyKeyer()))


def models():
  return TinyEncoder(), TinyKeyer()


@pytest.mark.parametrize("name, way", [
  *((name, WAYS[at % len(WAYS)]) for at, name in enumerate(PLACES)),
  *further(*((name, way) for name in PLACES for way in WAYS))])
def test_what_is_no_plain_file_is_told_and_not_touched(
  place, outside, name, way
):
  kind = put(way, place / name, outside)
  for use in (lambda: read(place),
              lambda: inspection.inspect(inspection.open_any(place))):
    assert f"{place / name} is {kind}" in told(use)
  assert name in [f.where for f in check(place).damage]
  with pytest.raises(McjaxError, match=f"{name} is {kind}"):
    tree = reopen(place, keyer=TinyKeyer())
    read(place)
    tree.append(random_ids(40))  # or here, for a shard that is written on
    tree.commit()


@pytest.mark.parametrize("way", ["folder", "pipe"])
def test_nothing_outside_is_deleted_or_written(place, outside, way):
  """With the folder that a rebuild, an erasure and a count would write."""
  tree = reopen(place, keyer=TinyKeyer())
  for name in ("gists/1", "access/L1", "access/L2/c"):
    (place / name).parent.mkdir(exist_ok=True)
    put(way, place / name, outside)
  tree.record_access(np.array([1, 2]), np.array([0, 0]))
  tree.append(random_ids(64))
  tree.commit()  # statistics fail no commit
  assert "gists/1 is" in told(lambda: tree.rebuild_gists(TinyEncoder(seed=1)))
  tree.close()
  assert Store(place).read_record()[0] is not None
  assert {"access/L1", "gists/1"} <= {f.where for f in check(place).damage}


@pytest.mark.parametrize("way", ["file", "pipe"])
@pytest.mark.parametrize("name", [RECORD_KEY, LOCK_NAME, OWNER_NAME])
def test_the_record_and_the_lock_are_no_links(place, outside, way, name):
  kind = put(way, place / name, outside)
  assert f"{name} is {kind}" in told(lambda: reopen(place))
  if name == RECORD_KEY:
    assert f"{name} is {kind}" in told(lambda: peek(place))


def test_what_was_put_in_place_of_something_goes_with_a_repair(
  whole, place, outside
):
  put("file", place / RECORD_KEY, outside)
  assert repair(place)[1][0].startswith("the commit record is that")
  put("pipe", place / COPY_KEY, outside)
  put("pipe", place / "gists/0/L1/c/5/0", outside)
  put("file", place / "keys/L2/zarr.json", outside)
  put("device", place / "access/L1/c/0", outside)
  report, done = repair(place, models)
  assert not report.findings and len(done) == 4
  found = read(place)
  for key, expected in whole[1].items():
    np.testing.assert_array_equal(found[key], expected)
