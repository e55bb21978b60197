"""One writer and any number of readers, also where something is odd."""

import os
import shutil
import threading
import time

from marks import EVERYWHERE
import numpy as np
import pytest

from mcjax.testing.tree_reference import (
  BASE,
  TinyEncoder,
  check,
  create,
  peek,
  random_ids,
)
from mcjax.tree import lease
from mcjax.tree.lock import LOCK_NAME, OWNER_NAME
from mcjax.tree.owner import Owner
from mcjax.tree.store import COPY_KEY, RECORD_KEY, Store
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError


def open_tree(url, **more):
  return MegaContextTree.open(url, encoder=TinyEncoder(), **BASE, **more)


@EVERYWHERE
def test_a_second_writer_is_refused_at_once_and_says_whom_it_met(url):
  first, ids = create(url), random_ids(200)
  known = dict(BASE, encoder=TinyEncoder())
  begin, me = time.perf_counter(), os.getpid()
  with pytest.raises(McjaxError, match=f"process {me} on .* for [0-9] s"):
    MegaContextTree.open(url, **known)
  assert time.perf_counter() - begin < 1
  first.append(ids)
  first.commit()
  first.close()
  second = MegaContextTree.open(url, **known)
  check(second, ids)
  second.close()


@EVERYWHERE
def test_a_reader_sees_whole_commits_and_refreshes(url):
  tree, ids = create(url), random_ids(40_000)
  reader = peek(url)
  tree.append(ids)
  check(reader, ids[:0])
  assert not reader.refresh()
  tree.commit()
  check(reader, ids[:0])
  assert reader.refresh()
  check(reader, ids)
  with reader.transient():  # as an answer that is not remembered
    reader.append(ids)
    check(reader, np.concatenate([ids, ids]))
  for write in (reader.commit, lambda: reader.append(ids[:1])):
    with pytest.raises(McjaxError, match='mode="r"'):
      write()
  reader.close()
  tree.close()
  with pytest.raises(McjaxError, match="mode 'w'"):
    MegaContextTree.open(url, mode="w", encoder=None, **BASE)


def test_a_deleted_folder_is_told_and_not_made_again(tmp_path):
  url, ids = tmp_path / "t", random_ids(100)
  tree = create(url)
  tree.append(ids)
  shutil.rmtree(url)
  with pytest.raises(McjaxError, match="deleted"):
    tree.commit()
  tree.close()
  assert not url.exists()


def test_an_interrupted_creation_is_done_again(tmp_path):
  url = tmp_path / "t"
  url.mkdir()
  for name in (".lock", ".owner.json", ".json_0a1b.__lock"):
    (url / ("mcjax_tree" + name)).write_text("")
  tree = create(url)
  tree.close()
  names = {RECORD_KEY, COPY_KEY, "mcjax_tree.lock"}
  assert {p.name for p in url.iterdir()} == names


def in_a_fork(call):
  """What a call says in a forked process, which may hang or print nothing."""
  ours, theirs = os.pipe()
  if not (pid := os.fork()):
    try:
      said = str(call())
    except BaseException as error:
      said = f"{type(error).__name__}: {error}"
    os.write(theirs, said.encode())
    os._exit(0)
  os.close(theirs)
  timer = threading.Timer(20, os.kill, (pid, 9))
  timer.start()
  with os.fdopen(ours) as pipe:
    said = pipe.read()
  os.waitpid(pid, 0)
  timer.cancel()
  return said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("url", ["file", "s3"], indirect=True)
def test_a_fork_neither_uses_nor_unlocks_the_tree_of_its_parent(url):
  tree, ids = create(url), random_ids(2000)
  tree.append(ids)
  tree.commit()
  for use in (tree.commit, lambda: tree.append(ids),
              lambda: tree.tokens(0, 5), lambda: tree.gists(1, 0, 1)):
    assert in_a_fork(use).startswith("McjaxError: the tree at")
  told = in_a_fork(lambda: open_tree(url, mode="r"))
  assert told.startswith("McjaxError: process") and "spawn" in told
  assert in_a_fork(tree.close) == "None"
  with pytest.raises(McjaxError, match=f"by process {os.getpid()} on"):
    open_tree(url)
  tree.append(ids)
  tree.commit()
  tree.close()
  with open_tree(url) as tree:
    check(tree, np.concatenate([ids, ids]))


def test_a_second_writer_that_a_lock_let_in_is_told(tmp_path):
  """As on a network file system that is mounted without locks."""
  tree, ids = create(tmp_path / "t"), random_ids(2000)
  tree.append(ids)
  tree.commit()
  tree.append(ids)
  other = Owner(7, "elsewhere", time.time())
  (tmp_path / "t" / OWNER_NAME).write_text(other.dump())
  with pytest.raises(McjaxError, match="by process 7 on elsewhere .* too"):
    tree.commit()
  tree.close()
  assert (tmp_path / "t" / OWNER_NAME).exists()  # it is the other one's
  with open_tree(tmp_path / "t") as tree:
    check(tree, ids)


def test_a_lock_that_somebody_deleted_is_taken_again(tmp_path):
  tree, ids = create(tmp_path / "t"), random_ids(2000)
  tree.append(ids)
  (tmp_path / "t" / LOCK_NAME).unlink()
  (tmp_path / "t" / OWNER_NAME).unlink()
  tree.commit()
  with pytest.raises(McjaxError, match="open for writing"):
    open_tree(tmp_path / "t")
  (tmp_path / "t" / LOCK_NAME).unlink()
  with open_tree(tmp_path / "t") as other:  # which was faster
    with pytest.raises(McjaxError, match="deleted or replaced"):
      tree.commit()
    other.append(ids[:5])
    other.commit()
  (tmp_path / "t" / LOCK_NAME).unlink()
  with pytest.raises(McjaxError, match="another process wrote"):
    tree.commit()
  tree.close()
  with open_tree(tmp_path / "t") as tree:
    check(tree, np.concatenate([ids, ids[:5]]))


@pytest.mark.parametrize("wrong", [-86_400, 86_400])
def test_a_clock_that_is_wrong_lets_nobody_into_a_lease_that_is_renewed(
  s3_url, monkeypatch, wrong
):
  """In the past it looks run out, from the future as held for a day."""
  monkeypatch.setattr(lease, "SECONDS", 1.0)
  create(s3_url).close()
  kv, done = Store(s3_url).kv, threading.Event()

  def renew():
    value = lease.Lease(
      Owner(7, "elsewhere", 0.0), "", time.time() + wrong, False,
      str(time.monotonic()))
    kv.write(lease.NAME, value.dump()).result()

  def keep_renewing():
    while not done.wait(0.1):
      renew()

  renew()
  holder = threading.Thread(target=keep_renewing)
  holder.start()
  try:
    with pytest.raises(McjaxError, match="process 7 on elsewhere"):
      open_tree(s3_url)
  finally:
    done.set()
    holder.join()
  tree = open_tree(s3_url)  # it is not renewed any more
  tree.append(random_ids(10))
  tree.commit()
  tree.close()
