"""Compaction: fewer files, forgotten text gone, safe under kills."""

import ast
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import mcjax
from mcjax.testing.tiny_base import memory_url
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
from mcjax.tree.compaction import compact, packed_shard
from mcjax.tree.store import ArraySpec, Store
from mcjax.types import McjaxError

ARTEFACTS = pathlib.Path(__file__).parent / "artefacts"
IDS = random_ids(300_000)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """A tree with two documents, one of them forgotten."""
  folder = tmp_path_factory.mktemp("compaction") / "t"
  tree = create(folder, keyer=TinyKeyer())
  tree.append(IDS)
  for name, start, stop in (("a", 5, 70_000), ("b", 70_000, 103_000)):
    tree.journal.add("document", name=name, start=start, stop=stop,
                     digest="d", metadata={"from": "me"}, time=1.0)
  tree.commit({"note": "x"})
  tree.close()
  return folder


def models():
  return TinyEncoder(), TinyKeyer()


def files(place):
  return sum("mcjax_tree" not in key for key in Store(place).keys())


def other_process(place):
  """A reader that shares no cache with the one who compacts."""
  alias = place.with_name("alias")
  alias.symlink_to(place)
  return peek(alias, keyer=TinyKeyer())


def forget(place, start, stop):
  tree = reopen(place, keyer=TinyKeyer())
  tree.journal.add("forgotten", start=start, stop=stop, time=2.0)
  tree.commit()
  tree.close()
  ids = IDS.copy()
  ids[start:stop] = 0
  return ids


def test_fewer_files_hold_the_same_tree_and_it_grows(stored, tmp_path):
  place = tmp_path / "t"
  shutil.copytree(stored, place)
  reader = other_process(place)
  done = compact(place)
  assert done.files_after == files(place) < done.files_before - 40
  assert done.erased == 0
  check(reader, IDS, keyer=TinyKeyer())  # its files are gone
  check(peek(place, keyer=TinyKeyer()), IDS, keyer=TinyKeyer())
  again = compact(place)
  assert again.files_after == done.files_after
  tree = reopen(place, keyer=TinyKeyer())
  tree.append(IDS)
  tree.commit()
  tree.close()
  assert compact(place).files_after <= done.files_after + 4
  ids = np.concatenate([IDS, IDS])
  tree = reopen(place, keyer=TinyKeyer())
  check(tree, ids, keyer=TinyKeyer())
  tree.rebuild_gists(TinyEncoder(seed=1))
  check(tree, ids, TinyEncoder(seed=1), keyer=TinyKeyer())
  tree.close()
  compact(place)
  encoder = TinyEncoder(seed=1)
  check(peek(place, encoder, keyer=TinyKeyer()), ids, encoder,
        keyer=TinyKeyer())


def test_packed_rows_are_held_against_their_checksums(stored, tmp_path):
  place = tmp_path / "t"
  shutil.copytree(stored, place)
  compact(place)
  packed = place / "gists/0/L1/packed/c"
  first, second = packed / "0/0", packed / "1/0"
  raw = first.read_bytes()
  first.write_bytes(second.read_bytes())
  with pytest.raises(McjaxError, match=r"gists/0/L1 .* damaged"):
    peek(place).gists(1, 0, 32)
  first.write_bytes(raw)
  check(peek(place), IDS, keyer=TinyKeyer())


def test_forgotten_text_is_erased_wherever_it_left_a_trace(stored, tmp_path):
  place = tmp_path / "t"
  shutil.copytree(stored, place)
  ids = forget(place, 70_000, 103_000)
  reader = other_process(place)
  with pytest.raises(McjaxError, match="needs its GistNet"):
    compact(place)
  check(peek(place, keyer=TinyKeyer()), IDS, keyer=TinyKeyer())
  done = compact(place, models)
  assert done.erased == np.count_nonzero(IDS[70_000:103_000])
  tree = peek(place, keyer=TinyKeyer())
  check(tree, ids, keyer=TinyKeyer())
  a, b = tree.journal.of("document")
  assert (a["name"], a["metadata"]) == ("a", {"from": "me"})
  assert (b["name"], b["digest"], b["metadata"]) == ("", "", {})
  assert tree.extra == {"note": "x"}
  assert not (place / "tokens").exists() and not (place / "gists/0").exists()
  with pytest.raises(McjaxError, match="written anew .* refresh"):
    reader.gists(1, 0, 9000)
  assert reader.refresh()
  check(reader, ids, keyer=TinyKeyer())
  assert compact(place, models).erased == 0
  ids = np.concatenate([ids, IDS[:5000]])
  tree = reopen(place, keyer=TinyKeyer())
  tree.append(IDS[:5000])
  tree.commit()
  tree.close()
  check(peek(place, keyer=TinyKeyer()), ids, keyer=TinyKeyer())


def test_other_models_and_other_writers_are_refused(stored, tmp_path):
  place = tmp_path / "t"
  shutil.copytree(stored, place)
  forget(place, 5, 70_000)
  for others in ((TinyEncoder(seed=3), TinyKeyer()),
                 (TinyEncoder(), TinyKeyer(seed=3))):
    with pytest.raises(McjaxError, match="tiny-3|tools/rekey"):
      compact(place, lambda others=others: others)
  tree = reopen(place)
  with pytest.raises(McjaxError, match="open for writing"):
    compact(place)
  tree.close()
  check(peek(place), IDS, keyer=TinyKeyer())
  with pytest.raises(McjaxError, match="no tree"):
    compact(tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_any_write_may_fail_and_nothing_is_lost(stored, tmp_path, monkeypatch):
  place = tmp_path / "t"
  shutil.copytree(stored, place)
  ids, allowed = forget(place, 70_000, 103_000), 0
  while True:
    with monkeypatch.context() as patch:
      FailingWrites(patch, allowed)
      try:
        done = compact(place, models)
        break
      except McjaxError as error:
        assert "No space left" in str(error)
    tree = peek(place, keyer=TinyKeyer())
    erased = tree.tokens(70_000, 70_100).max() == 0
    tokens = ids if erased else IDS
    np.testing.assert_array_equal(tree.tokens(0, len(ids)), tokens)
    if allowed % 12 == 0:
      check(tree, tokens, keyer=TinyKeyer())
    allowed += 4
  assert done.files_after < done.files_before
  check(peek(place, keyer=TinyKeyer()), ids, keyer=TinyKeyer())


@pytest.mark.parametrize("count", [
  8, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_leave_the_old_or_the_new_state(tmp_path, count):
  root = pathlib.Path(mcjax.__file__).parents[1]
  done = subprocess.run(
    [sys.executable, "-m", "mcjax.testing.compaction_kills", str(tmp_path),
     str(count), "1"],
    cwd=root, capture_output=True, text=True, check=True)
  outcomes = ast.literal_eval(done.stdout)
  assert outcomes.keys() <= {"old", "new"}
  assert sum(outcomes.values()) >= min(count, 20)


def test_a_tree_in_memory_and_an_old_one(tmp_path):
  url = memory_url()
  tree = create(url)
  tree.append(IDS)
  tree.commit()
  tree.close()
  done = compact(url)
  assert done.files_after < done.files_before
  check(peek(url), IDS)
  shutil.copytree(ARTEFACTS / "tree_v1", tmp_path / "t")
  encoder = TinyEncoder(d_model=4)
  before = peek(tmp_path / "t", encoder)
  ids = before.tokens(0, before.cursor)
  compact(tmp_path / "t")
  check(peek(tmp_path / "t", encoder), ids, encoder)


@pytest.mark.parametrize("spec, rows", [
  (ArraySpec("uint16", 0, 1024, 2**15), 2**20),
  (ArraySpec("bfloat16", 576, 32, 256), 2**13),
  (ArraySpec("float32", 4096, 32, 256), 2**10),
])
def test_rows_of_a_packed_file(spec, rows):
  assert packed_shard(spec) == rows
