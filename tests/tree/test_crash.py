"""Trees whose writers are killed, and files that are damaged or exchanged."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import mcjax
from mcjax.testing.tree_reference import (
  TinyKeyer,
  check,
  create,
  peek,
  random_ids,
  reopen,
)
from mcjax.tree.store import COPY_KEY, RECORD_KEY
from mcjax.types import McjaxError


def torture(*arguments):
  """What tools/torture_tree prints; it forks, so a process of its own."""
  root = pathlib.Path(mcjax.__file__).parents[1]
  done = subprocess.run(
    [sys.executable, "tools/torture_tree.py", *arguments], cwd=root, text=True,
    capture_output=True, check=False,
    env=os.environ | {"PYTHONPATH": str(root)})
  assert done.returncode == 0, done.stderr + done.stdout
  return done.stdout


def test_fifty_kills_with_ordinary_runs_between_lose_nothing():
  said = torture("--kills=50", "--seed=1")
  assert "50 kills" in said and "0 with damage" in said
  states = {line.split()[0] for line in said.splitlines()[1:-1]}
  assert len(states) >= 4, said


def test_the_torture_finds_a_tree_whose_record_is_written_first(tmp_path):
  """It would be worth nothing if it could not fail."""
  script = """
import sys
from mcjax.testing import torture
from mcjax.tree.tree import MegaContextTree as Tree
commit = Tree.commit
def record_first(tree, extra=None):
  tree._write_record(dict(tree._record, cursor=tree.cursor, extra=extra or {}))
  commit(tree, extra)
Tree.commit = record_first
outcomes = torture.torture(sys.argv[1], 60, 1)
sys.exit(7 if any(o.found != "ok" for o in outcomes) else 0)
"""
  done = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)], capture_output=True,
    check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
  assert done.returncode == 7, done.stderr


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
  """A tree's folder after each of three commits, and its tokens then."""
  folder = tmp_path_factory.mktemp("generations")
  ids, keyer = random_ids(45_000), TinyKeyer()
  tree = create(folder / "t", keyer=keyer)
  out = []
  for stop in (9_000, 40_000, 45_000):
    tree.append(ids[tree.cursor : stop])
    tree.journal.add("note", text="x" * stop)
    tree.commit()
    shutil.copytree(folder / "t", folder / str(stop))
    out.append(folder / str(stop))
  tree.close()
  return out, ids, keyer


def test_a_stale_and_an_exchanged_shard_are_told_where_they_are(
  generations, tmp_path
):
  folders, ids, _ = generations
  place = tmp_path / "t"
  shutil.copytree(folders[2], place)
  shutil.copy(folders[0] / "gists/0/L1/c/1/0", place / "gists/0/L1/c/1/0")
  tree = peek(place)
  tree.tokens(0, 45_000)
  tree.gists(1, 0, 256)
  with pytest.raises(McjaxError, match=r"gists/0/L1 .* rows 256 to 288 "):
    tree.gists(1, 285, 286)


def test_an_older_record_that_is_put_back_is_told(generations, tmp_path):
  folders, ids, keyer = generations
  place = tmp_path / "t"
  shutil.copytree(folders[2], place)
  shutil.copy(folders[1] / RECORD_KEY, place)
  with pytest.raises(McjaxError, match="older one .* commit 3 of 4"):
    peek(place, keyer=keyer)
  (place / RECORD_KEY).unlink()
  with pytest.raises(McjaxError, match="record of .* is missing"):
    peek(place, keyer=keyer)
  shutil.copy(place / COPY_KEY, place / RECORD_KEY)
  check(peek(place, keyer=keyer), ids, keyer=keyer)


@pytest.mark.parametrize("copy", ["older", "lost", "damaged"])
def test_the_record_counts_whatever_its_copy_says(generations, tmp_path, copy):
  folders, ids, keyer = generations
  place = tmp_path / "t"
  shutil.copytree(folders[2], place)
  if copy == "older":  # as a writer leaves it that dies between the two
    shutil.copy(folders[1] / COPY_KEY, place)
  elif copy == "lost":
    (place / COPY_KEY).unlink()
  else:
    (place / COPY_KEY).write_bytes(b"{}")
  check(peek(place, keyer=keyer), ids, keyer=keyer)
  tree = reopen(place, keyer=keyer)
  tree.append(ids[:5])
  tree.commit()
  tree.close()
  assert (place / COPY_KEY).read_bytes() == (place / RECORD_KEY).read_bytes()
