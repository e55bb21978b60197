"""Trees in a bucket: the writer's lease, servers that are not there.

The faults that a tree stands wherever it lies are in test_tree.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mcjax import MegaContext
from mcjax.testing.tree_reference import (
  BASE,
  TinyEncoder,
  check,
  create,
  random_ids,
)
from mcjax.tree import lease
from mcjax.tree.owner import Owner
from mcjax.tree.store import Store
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError


def open_tree(url):
  return MegaContextTree.open(url, encoder=TinyEncoder(), **BASE)


_WRITER = """
import sys
from mcjax.testing.tree_reference import create, random_ids
tree = create(sys.argv[1])
tree.append(random_ids(100))
tree.commit()
tree.append(random_ids(50))
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_writer_is_followed_at_once(s3_url):
  writer = subprocess.Popen(
    [sys.executable, "-c", _WRITER, s3_url], stdin=subprocess.PIPE,
    stdout=subprocess.PIPE, env=os.environ | {
      "PYTHONPATH": os.pathsep.join(sys.path)})
  assert writer.stdout.readline() == b"ready\n"
  begin = time.monotonic()
  with pytest.raises(McjaxError, match=f"by process {writer.pid} on .* for"):
    open_tree(s3_url)
  assert time.monotonic() - begin < 1
  os.kill(writer.pid, signal.SIGKILL)
  writer.communicate()
  tree = open_tree(s3_url)
  check(tree, random_ids(100))
  tree.append(random_ids(40))
  tree.commit()
  tree.close()


def put(url, **changes):
  """Writes the lease of another machine."""
  made = lease.Lease(
    Owner(7, "elsewhere", time.time()), "", time.time(), False, "x")
  value = dataclasses.replace(made, **changes).dump()
  Store(url).kv.write(lease.NAME, value).result()


def test_a_lease_elsewhere_holds_until_it_runs_out(s3_url):
  tree = create(s3_url)
  tree.close()
  put(s3_url)
  with pytest.raises(McjaxError, match="process 7 on elsewhere"):
    open_tree(s3_url)
  put(s3_url, renewed=time.time() - lease.SECONDS - lease.SKEW - 1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lease, "SECONDS", 0.5)  # that it is watched
    tree = open_tree(s3_url)
  put(s3_url)  # a third one takes it, though we renew it
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lease, "SECONDS", 0.0)
    tree.append(random_ids(10))
    with pytest.raises(McjaxError, match="taken over by another writer"):
      tree.commit()
  tree.close()
  with pytest.raises(McjaxError, match="process 7 on elsewhere"):
    open_tree(s3_url)  # closing did not give back what is another one's


def test_a_lease_is_renewed_and_given_back_when_it_is_forgotten(
  s3_url, monkeypatch
):
  monkeypatch.setattr(lease, "SECONDS", 0.4)
  monkeypatch.setattr(lease, "SKEW", 0.0)
  tree = create(s3_url)

  def stored():
    return Store(s3_url).kv.read(lease.NAME).result().value

  before = stored()
  time.sleep(0.6)
  after = stored()
  assert lease.Lease.parse(after).renewed > lease.Lease.parse(before).renewed
  del tree
  assert lease.Lease.parse(stored()).free


@pytest.mark.parametrize("raw", [b"", b"[1]", b'{"pid": 1}'])
def test_a_lease_that_makes_no_sense_keeps_nobody_out(s3_url, raw):
  create(s3_url).close()
  Store(s3_url).kv.write(lease.NAME, raw).result()
  open_tree(s3_url).close()


def test_a_process_is_known_by_more_than_its_number():
  me = lease.process_identity()
  assert not lease.is_gone(me)
  assert lease.is_gone(me[: me.rindex(" ")] + " 1")  # started at another time
  assert not lease.is_gone("another machine " + me[-10:])
  assert not lease.is_gone("")


def test_two_processes_that_want_it_at_once(s3_url):
  code = """
import sys
from mcjax.testing import contention
print(contention.two_writers(sys.argv[1], 16, 0))
"""
  done = subprocess.run(
    [sys.executable, "-c", code, s3_url], capture_output=True, text=True,
    check=False, env=os.environ | {
      "PYTHONPATH": os.pathsep.join(sys.path)})
  assert "'commits': 16, 'lost': 0, 'mixed': 0" in done.stdout, done.stderr


def test_a_server_that_is_not_there_is_told_soon(s3_url):
  begin = time.monotonic()
  with pytest.raises(McjaxError, match=r"could not read s3://.*[Cc]onnect"):
    open_tree(f"{s3_url}?endpoint=http://127.0.0.1:9")
  assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_a_server_that_says_nothing_is_told_within_half_a_minute(s3_url):
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen(50)
    port, begin = silent.getsockname()[1], time.monotonic()
    with pytest.raises(McjaxError, match=r"could not read s3://.*imeout"):
      open_tree(f"{s3_url}?endpoint=http://127.0.0.1:{port}")
    assert time.monotonic() - begin < 40


def test_a_bucket_that_is_not_there(s3_url):
  with pytest.raises(McjaxError, match="s3://none/t/"):
    create("s3://none/t")


def test_ingest_and_answer_from_a_bucket(s3_url, make, tiny_lm, tiny_gistnet):
  mc = make(s3_url)
  mc.ingest("the cat sat on the mat " * 20, name="cat")
  mc.close()
  mc = MegaContext.open(s3_url, tiny_lm, gistnet=tiny_gistnet)
  assert [d.name for d in mc.documents()] == ["cat"]
  before = mc.cursor
  mc.generate("the cat", 4)
  mc.close()
  mc = MegaContext.open(s3_url, tiny_lm, gistnet=tiny_gistnet, mode="r")
  assert mc.cursor > before
  mc.close()
