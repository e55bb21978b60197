"""Lens keys in the stored tree: contents, commits, crashes and rebuilds."""

import shutil

from hypothesis import given, settings
from hypothesis import strategies as st
from marks import further
import numpy as np
import pytest

from mcjax.testing.tiny_base import memory_url
from mcjax.testing.tree_reference import (
  BASE,
  FailingWrites,
  TinyEncoder,
  TinyKeyer,
  check,
  create,
  peek,
  random_ids,
  reopen,
)
from mcjax.tree import format as tree_format
from mcjax.tree.store import decode_record
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError


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
  check(peek(url), ids, dtype=dtype, keyer=keyer)
  tree = reopen(url, keyer=keyer)
  assert tree.nbytes_on_disk()["lens"] < 2400 * 3 + 8192
  tree.append(ids[:5000])
  tree.commit()
  ids = np.concatenate([ids, ids[:5000]])
  check(peek(url, keyer=keyer), ids, dtype=dtype, keyer=keyer)


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
  check(peek(url, keyer=own), ids, keyer=own)
  tree.append(ids[:1])
  check(tree, np.append(ids, ids[0]))
  check(peek(url), ids, keyer=own)  # not committed yet
  tree.commit()
  assert not lens_files(tree)
  ids = np.append(ids, ids[0])
  check(peek(url, keyer=own), ids)
  tree = reopen(url)
  tree.rebuild_lens_keys(own)
  assert lens_files(tree) == {"1"}  # no epoch is used twice
  check(peek(url), ids, keyer=own)


def test_without_a_gistnet_lens_keys_are_read():
  url, ids, keyer = memory_url(), random_ids(1100), TinyKeyer()
  lens_tree(url, ids, keyer).close()
  tree = MegaContextTree.open(url, encoder=None, **BASE)
  check(tree, ids, keyer=keyer)
  tree.rebuild_lens_keys(TinyKeyer(7, 2))
  check(peek(url), ids, keyer=TinyKeyer(7, 2))


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
  check(peek(url), ids, keyer=new)
  tree.append(ids[:3000])  # the new keyer goes on
  tree.commit()
  ids = np.concatenate([ids, ids[:3000]])
  check(peek(url), ids, keyer=new)
  tree.rebuild_lens_keys(TinyKeyer())
  assert lens_files(tree) == {"2"}
  check(peek(url), ids, keyer=TinyKeyer())


def test_rebuild_lens_keys_of_an_empty_tree(url):
  tree, ids = create(url), random_ids(1100)
  tree.rebuild_lens_keys(TinyKeyer())
  tree.append(ids)
  tree.commit()
  check(peek(url), ids, keyer=TinyKeyer())


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
  check(peek(url), ids)


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
    check(peek(url, encoder), ids, encoder, keyer=keyer)
  else:
    check(peek(url), ids, keyer=TinyKeyer(6, 3))


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
  check(peek(url), ids, keyer=held)


def test_damaged_lens_keys_are_told(tmp_path):
  lens_tree(tmp_path / "t", random_ids(1100), TinyKeyer()).close()
  shutil.rmtree(tmp_path / "t" / "lens")
  with pytest.raises(McjaxError, match="could not"):
    reopen(tmp_path / "t")
