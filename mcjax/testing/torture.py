"""Kills processes that write a tree, and looks at what they leave.

A victim creates or opens a tree, appends, commits, rebuilds and closes until
it gets a SIGKILL: at a random moment, or, where `strace` is there, at a random
system call. Then an ordinary run opens the tree, compares everything in it
with what its tokens must give, appends, commits and closes; and the next
victim goes on with the same tree. Needs no accelerator and no base model.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import multiprocessing
from multiprocessing.connection import Connection
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from mcjax.testing import tree_reference as reference
from mcjax.tree.store import Store, decode_record
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_APPENDS = (1, 33, 400, 3000, 36_000)  # tokens; the last one fills shards
_RUNS_PER_TREE = 8  # victims, before a new tree is begun
_PATIENCE = 60.0  # seconds that a victim may take to begin
_CALLS = "write,pwrite64,rename,openat,unlink,mkdir,fsync,fdatasync,close,flock"


def stream(start: int, stop: int) -> np.ndarray:
  """Tokens [start, stop) of the only text that is ever written: int32 [n]."""
  at = np.arange(start, stop, dtype=np.uint64)
  mixed = (at * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
  return (mixed % np.uint64(reference.VOCAB)).astype(np.int32)


def encoder_of(url: str) -> reference.TinyEncoder:
  """The encoder that the commit record names."""
  raw, _ = Store(url).read_record()
  if raw is None:
    return reference.TinyEncoder()
  name: Any = decode_record(raw, url)["gistnet"]
  return reference.TinyEncoder(seed=int(name["fingerprint"].split("-")[1]))


def open_or_create(url: str) -> MegaContextTree:
  """As a user's program does."""
  if MegaContextTree.exists(url):
    return MegaContextTree.open(
      url, encoder=encoder_of(url), **reference.BASE)
  return MegaContextTree.create(
    url, encoder=reference.TinyEncoder(), vocab_size=reference.VOCAB,
    **reference.BASE)


def victim(url: str, seed: int, pipe: Connection | None) -> None:
  """Writes until it is killed; tells what it does and what is committed."""
  rng = np.random.default_rng(seed)

  def tell(doing: str, committed: int = 0) -> None:
    if pipe is not None:
      pipe.send((doing, committed))
    else:
      os.write(1, f"{doing} {committed}\n".encode())

  tell("open")
  tree = open_or_create(url)
  while True:
    tell("append", tree.committed)
    for _ in range(rng.integers(1, 4)):
      count = int(rng.choice(_APPENDS))
      tree.append(stream(tree.cursor, tree.cursor + count))
    tree.record_access(np.array(1), np.arange(min(3, tree.num_nodes(1))))
    tell("commit", tree.committed)
    tree.commit({"cursor": tree.cursor})
    if rng.random() < 0.2:
      tell("rebuild", tree.committed)
      tree.rebuild_gists(reference.TinyEncoder(seed=int(rng.integers(5))))
    if rng.random() < 0.3:
      tell("close", tree.committed)
      tree.close()
      tell("open", tree.committed)
      tree = open_or_create(url)


def ordinary_run(url: str, committed: int) -> str:
  """Opens, compares, appends, commits, closes; what went wrong, or "ok"."""
  there = MegaContextTree.exists(url)
  try:
    tree = open_or_create(url)
  except McjaxError as error:
    return f"{'does not open' if there else 'not created again'}: {error}"
  if tree.cursor < committed:
    return f"lost: {tree.cursor} of {committed} committed tokens"
  try:
    ids = stream(0, tree.cursor)
    reference.check(tree, ids, encoder_of(url))
    tree.append(stream(tree.cursor, tree.cursor + 400))
    tree.commit()
    tree.close()
    with MegaContextTree.open(
      url, encoder=encoder_of(url), **reference.BASE) as tree:
      reference.check(tree, stream(0, len(ids) + 400), encoder_of(url))
  except (McjaxError, AssertionError) as error:
    return f"changed: {str(error).splitlines()[0]}"
  return "ok"


def _killed_at_a_moment(
  url: str, seed: int, rng: np.random.Generator
) -> tuple[str, int]:
  """Forks a victim and kills it; what it did, and what it had committed."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([__name__])
  ours, theirs = context.Pipe(duplex=False)
  process = context.Process(target=victim, args=(url, seed, theirs))
  process.start()
  theirs.close()
  doing, committed = "start", 0
  for _ in range(int(rng.integers(1, 9))):  # so that every kind of work is met
    if not ours.poll(_PATIENCE):
      raise McjaxError("a victim does nothing")
    doing, committed = ours.recv()
  time.sleep(rng.exponential(0.02))
  assert process.pid is not None
  os.kill(process.pid, signal.SIGKILL)
  process.join()
  while ours.poll():  # what it told before it died
    try:
      doing, committed = ours.recv()
    except EOFError:
      break
  return doing, committed


def _killed_at_a_call(
  url: str, seed: int, rng: np.random.Generator
) -> tuple[str, int]:
  """As `_killed_at_a_moment`, when a system call is made for the nth time."""
  when = int(rng.integers(1, 120))
  code = ("from mcjax.testing import torture; import tensorstore;"
          f" torture.victim({url!r}, {seed}, None)")
  # Only calls on the tree's files count: those after the imports.
  done = subprocess.run(
    ["strace", "-f", "-qq", "-o", "/dev/null", "-P", url, "-P",
     url + "/mcjax_tree.json", "-e", f"trace={_CALLS}", "-e",
     f"inject={_CALLS}:signal=KILL:when={when}", sys.executable, "-c", code],
    capture_output=True, text=True, timeout=_PATIENCE, check=False,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  )
  told = [line.split() for line in done.stdout.splitlines() if " " in line]
  return (told[-1][0], int(told[-1][1])) if told else ("start", 0)


def torture(folder: pathlib.Path, kills: int, seed: int, calls: bool = False
            ) -> Iterator[tuple[str, str]]:
  """Kills so many victims.

  Args:
    folder: for the trees.
    kills: victims.
    seed: of everything but the moments, which are the clock's.
    calls: every other one dies at a system call; needs `strace`.

  Yields:
    For each, what it was doing and what the ordinary run behind it found:
    "ok", or what went wrong.
  """
  rng = np.random.default_rng(seed)
  for number in range(kills):
    url = str(folder / f"tree-{number // _RUNS_PER_TREE}")
    kill = _killed_at_a_call if calls and number % 2 else _killed_at_a_moment
    doing, committed = kill(url, seed + number, rng)
    outcome = ordinary_run(url, committed)
    yield doing, outcome
    if outcome == "ok" and number % _RUNS_PER_TREE == _RUNS_PER_TREE - 1:
      shutil.rmtree(url)


def table(outcomes: list[tuple[str, str]]) -> str:
  """How often what was found after a kill in which work."""
  counts = collections.Counter((d, o.split(":")[0]) for d, o in outcomes)
  found = ["ok", *sorted({o for _, o in counts} - {"ok"})]
  lines = [f"{'killed in':12}" + "".join(f"{o:>20}" for o in found)]
  for doing in sorted({d for d, _ in counts}):
    row = "".join(f"{counts[doing, o]:20d}" for o in found)
    lines.append(f"{doing:12}{row}")
  return "\n".join(lines)
