"""Kills processes that write a tree, and looks at what they leave.

A victim makes short runs after one another: it creates or opens the tree,
ingests, forgets, rebuilds, commits and closes, until it gets a SIGKILL: after a
random time, or, where `strace` can attach to it, at the n-th system call of one
of its threads that touches a file or a socket. Then an ordinary run opens the
tree, compares everything in it with what its tokens must give, appends, commits
and closes; and the next victim goes on with the same tree, or begins anew.

Victims and ordinary runs are forked from this process, which has imported
everything and must never use TensorStore itself (its threads do not survive a
fork): so run `torture` in a process of its own, as `tools/torture_tree` does.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import contextlib
import ctypes
import functools
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from typing import Any, NamedTuple

import numpy as np
import numpy.ma  # noqa: F401  here, lest every forked process imports it
import numpy.testing  # noqa: F401

from mcjax.testing import tree_reference as reference
from mcjax.tree.store import Store, decode_record
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

STATES = ("start", "create", "open", "append", "ingest", "forget", "rebuild",
          "close")
_WORK = STATES[3:-1]  # between open and close
_APPENDS = (1, 33, 400, 3000, 36_000)  # tokens; the last one fills shards
_LONGEST = 90_000  # tokens of a tree; what is longer is checked slowly
_ENCODERS = 5
_ANEW = 0.25  # how often a victim begins a new tree
_PATIENCE = 120.0  # seconds that a victim may live
_FILE_CALLS = (
  "write,pwrite64,rename,renameat,renameat2,openat,unlink,unlinkat,mkdir,fsync,"
  "fdatasync,ftruncate,close,flock")
_SOCKET_CALLS = "connect,sendto,sendmsg,write,writev,recvfrom,recvmsg,poll"
_PR_SET_PTRACER = 0x59616D61


class Outcome(NamedTuple):
  """Of one kill.

  Attributes:
    doing: what the victim did then, one of `STATES`.
    how: "moment" or "call".
    found: by the ordinary run behind it: "ok", or what went wrong.
  """

  doing: str
  how: str
  found: str


class Board:
  """What a victim tells, in shared memory: telling takes no system call."""

  def __init__(self):
    self._cells = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)

  def clear(self) -> None:
    self._cells[:] = 0

  @property
  def doing(self) -> str:
    return STATES[self._cells[0]]

  @property
  def committed(self) -> tuple[int, int]:
    """Tokens and events that a commit has returned for."""
    return int(self._cells[1]), int(self._cells[2])

  @committed.setter
  def committed(self, counts: tuple[int, int]) -> None:
    self._cells[1:3] = counts

  @property
  def go(self) -> bool:
    """Whether the victim may go on; it waits where `wait_at` says."""
    return bool(self._cells[3])

  @go.setter
  def go(self, may: bool) -> None:
    self._cells[3] = may

  def wait_at(self, state: str) -> None:
    self._cells[4] = STATES.index(state)

  def tell(self, state: str) -> None:
    """Says what is done next; waits there once, if told to."""
    self._cells[0] = STATES.index(state)
    if self._cells[4] == self._cells[0]:
      self._cells[5] = True
      while not self.go:
        time.sleep(0.001)

  @property
  def waits(self) -> bool:
    """Whether the victim has come where it should wait."""
    return bool(self._cells[5])


# What is written.


def stream(start: int, stop: int) -> np.ndarray:
  """Tokens [start, stop) of the only text that is ever written: int32 [n]."""
  at = np.arange(start, stop, dtype=np.uint64)
  mixed = (at * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
  return (mixed % np.uint64(reference.VOCAB)).astype(np.int32)


def event(number: int) -> dict:
  """The only events that are ever written: documents, some forgotten."""
  start = 7 * number
  kind = "forgotten" if number % 3 == 2 else "document"
  return {"kind": kind, "start": start, "stop": start + 5, "number": number}


@functools.cache
def encoder(seed: int) -> reference.TinyEncoder:
  """One of those that a tree may belong to."""
  return reference.TinyEncoder(seed=seed)


def encoder_of(url: str) -> reference.TinyEncoder:
  """The encoder that the commit record names."""
  raw, _ = Store(url).read_record()
  if raw is None:
    return encoder(0)
  name: Any = decode_record(raw, url)["gistnet"]
  return encoder(int(name["fingerprint"].split("-")[1]))


def open_or_create(
  url: str, tell: Callable[[str], None] = lambda state: None
) -> MegaContextTree:
  """As a user's program does."""
  if MegaContextTree.exists(url):
    tell("open")
    return MegaContextTree.open(
      url, encoder=encoder_of(url), **reference.BASE)
  tell("create")
  return MegaContextTree.create(
    url, encoder=encoder(0), vocab_size=reference.VOCAB,
    **reference.BASE)


def _append(tree: MegaContextTree, rng: np.random.Generator) -> None:
  count = int(rng.choice(_APPENDS))
  if tree.cursor + count < _LONGEST:
    tree.append(stream(tree.cursor, tree.cursor + count))


def _commit_event(tree: MegaContextTree) -> None:
  number = len(tree.journal.events)
  tree.journal.add(**event(number))
  tree.commit({"cursor": tree.cursor, "events": number + 1})


def work(tree: MegaContextTree, state: str, rng: np.random.Generator) -> None:
  """Does one of the things that `STATES` names between open and close."""
  if state in ("append", "ingest"):
    _append(tree, rng)
  if state == "ingest":
    tree.record_access(np.array(1), np.arange(min(3, tree.num_nodes(1))))
  if state in ("ingest", "forget"):
    _commit_event(tree)
  if state == "rebuild":
    if tree.cursor > tree.committed:  # else it commits, and no event with it
      _commit_event(tree)
    tree.rebuild_gists(encoder(int(rng.integers(_ENCODERS))))


def victim(url: str, seed: int, board: Board) -> None:
  """Makes short runs until it is killed."""
  rng = np.random.default_rng(seed)
  while True:
    tree = open_or_create(url, board.tell)
    for _ in range(int(rng.integers(1, 5))):
      state = str(rng.choice(_WORK, p=[0.15, 0.5, 0.15, 0.2]))
      board.tell(state)
      work(tree, state, rng)
      if state != "append":
        board.committed = tree.committed, len(tree.journal.events)
    board.tell("close")
    tree.close()


def ordinary_run(url: str, committed: tuple[int, int]) -> str:
  """Opens, compares, appends, commits, closes; what went wrong, or "ok"."""
  there = MegaContextTree.exists(url)
  try:
    tree = open_or_create(url)
  except McjaxError as error:
    return f"{'does not open' if there else 'not created again'}: {error}"
  tokens, events = committed
  if tree.cursor < tokens or len(tree.journal.events) < events:
    return (f"lost: {tree.cursor} tokens, {len(tree.journal.events)} events of"
            f" {tokens}, {events} committed")
  try:
    _compare(tree)
    tree.append(stream(tree.cursor, tree.cursor + 400))
    _commit_event(tree)
    tree.close()
    with open_or_create(url) as tree:
      _compare(tree)
  except (McjaxError, AssertionError) as error:
    return f"changed: {str(error).strip().splitlines()[0]}"
  return "ok"


def _compare(tree: MegaContextTree) -> None:
  """Raises AssertionError unless the tree is whole."""
  reference.check(tree, stream(0, tree.cursor), encoder_of(tree.url))
  events = tree.journal.events
  assert events == [event(number) for number in range(len(events))], "events"
  if tree.extra:
    whole = {"cursor": tree.cursor, "events": len(events)}
    assert tree.extra == whole, f"{tree.extra} is not {whole}"


# Processes.


def forked(call: Callable[..., str | None], *args) -> tuple[int, int]:
  """Runs a call in a child; its process id and where it writes its result."""
  ours, theirs = os.pipe()
  pid = os.fork()
  if pid:
    os.close(theirs)
    return pid, ours
  try:
    os.close(ours)
    _let_trace()
    said = call(*args) or ""
  except BaseException:
    said = "failed: " + traceback.format_exc().strip().splitlines()[-1]
  with contextlib.suppress(OSError):  # of a parent that was interrupted
    os.write(theirs, said.encode())
  os._exit(0)


def result(child: tuple[int, int]) -> tuple[str, int]:
  """What a child returned, and the signal that ended it (0: none)."""
  pid, pipe = child
  with os.fdopen(pipe, "rb") as file:
    said = file.read().decode()
  _, status = os.waitpid(pid, 0)
  return said, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _let_trace() -> None:
  """Lets strace attach, which is not an ancestor of this process."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


def _wait_for(condition: Callable[[], bool], what: str) -> None:
  end = time.monotonic() + _PATIENCE
  while not condition():
    if time.monotonic() > end:
      raise McjaxError(what)
    time.sleep(0.001)


def _ended(pid: int) -> bool:
  with open(f"/proc/{pid}/stat", encoding="ascii") as file:
    return file.read().rpartition(") ")[2].startswith("Z")


def _traced(pid: int) -> bool:
  with open(f"/proc/{pid}/status", encoding="ascii") as file:
    line = next(line for line in file if line.startswith("TracerPid"))
  return int(line.split()[1]) > 0


def _kill_at_a_moment(pid: int, board: Board, rng: np.random.Generator) -> None:
  board.go = True
  time.sleep(rng.exponential(0.02))
  os.kill(pid, signal.SIGKILL)


def _kill_at_a_call(
  pid: int, board: Board, rng: np.random.Generator, calls: str
) -> None:
  """Has the kernel kill it when a thread of it makes its n-th such call."""
  when = int(rng.geometric(0.1))
  strace = subprocess.Popen(
    ["strace", "-f", "-qq", "-o", os.devnull, "-p", str(pid), "-e",
     f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={when}"])
  _wait_for(lambda: _traced(pid) or strace.poll() is not None,
            "strace does not attach")
  board.go = True
  try:
    strace.wait(_PATIENCE)
  except subprocess.TimeoutExpired:  # no thread made so many calls
    os.kill(pid, signal.SIGKILL)
    strace.wait()


def can_trace() -> bool:
  """Whether strace is there and may attach to a child."""
  if sys.platform != "linux" or shutil.which("strace") is None:
    return False
  board, rng = Board(), np.random.default_rng(0)

  def child() -> None:
    while True:
      os.write(os.open(os.devnull, os.O_WRONLY), b"x")

  process = forked(child)
  with_strace = True
  try:
    _kill_at_a_call(process[0], board, rng, _FILE_CALLS)
  except (McjaxError, OSError):
    with_strace = False
  if not with_strace:
    os.kill(process[0], signal.SIGKILL)
  return result(process)[1] == signal.SIGKILL and with_strace


def one_kill(url: str, seed: int, how: str, rng: np.random.Generator,
             board: Board, anew: bool) -> Outcome:
  """Kills one victim, and looks at what it leaves.

  Args:
    url: of the tree.
    seed: of what the victim does.
    how: "moment" or "call".
    rng: of when it is killed.
    board: on which it tells what it does.
    anew: there is no tree yet.
  """
  board.clear()
  board.wait_at(str(rng.choice(
    STATES[2:] if not anew or rng.random() < 0.2 else STATES[1:2])))
  child = forked(victim, url, seed, board)
  try:
    _wait_for(lambda: board.waits or _ended(child[0]), "a victim does nothing")
    if how == "call":
      remote = "://" in url
      calls = _SOCKET_CALLS if remote else _FILE_CALLS
      _kill_at_a_call(child[0], board, rng, calls)
    else:
      _kill_at_a_moment(child[0], board, rng)
  except BaseException:
    os.kill(child[0], signal.SIGKILL)
    raise
  said, ended_by = result(child)
  doing, committed = board.doing, board.committed
  if ended_by != signal.SIGKILL:
    return Outcome(doing, how, f"victim {said}")
  said, ended_by = result(forked(ordinary_run, url, committed))
  return Outcome(doing, how, said if not ended_by else f"signal {ended_by}")


def torture(place: str, kills: int, seed: int, calls: bool = False
            ) -> Iterator[Outcome]:
  """Kills so many victims.

  Args:
    place: folder or url under which the trees lie. A tree that is damaged
      stays there, those that are not are deleted.
    kills: victims.
    seed: of everything but the moments, which are the clock's.
    calls: every other one dies at a system call; see `can_trace`.

  Yields:
    What came of each.
  """
  rng, board = np.random.default_rng(seed), Board()
  for each in range(_ENCODERS):
    encoder(each)  # once, for every process that is forked
  number, url, anew = 0, f"{place}/tree-0", True
  for kill in range(kills):
    how = "call" if calls and kill % 2 else "moment"
    out = one_kill(url, seed * 1_000_000 + kill, how, rng, board, anew)
    yield out
    anew = out.found != "ok" or rng.random() < _ANEW
    if not anew:
      continue
    if out.found == "ok":
      result(forked(_remove, url))
    number += 1
    url = f"{place}/tree-{number}"


def _remove(url: str) -> None:
  store = Store(url)
  store.delete("")
  if store.folder is not None:
    shutil.rmtree(store.folder)


def table(outcomes: list[Outcome]) -> str:
  """How often what was found after a kill in which work."""
  counts = collections.Counter((o.doing, o.found.split(":")[0])
                               for o in outcomes)
  found = ["ok", *sorted({o for _, o in counts} - {"ok"})]
  lines = [f"{'killed in':12}" + "".join(f"{o:>20}" for o in found)]
  for doing in STATES:
    if any(doing == d for d, _ in counts):
      row = "".join(f"{counts[doing, o]:20d}" for o in found)
      lines.append(f"{doing:12}{row}")
  return "\n".join(lines)
