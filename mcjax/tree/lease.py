"""The right to write a tree on an object store: a lease that is renewed.

One small object says who holds the tree. It is only ever replaced by a write
that is conditional on what was read (If-Match, If-None-Match; Google's
generations), which these servers do atomically, so of two that want it one gets
it. The holder renews it from a thread. A lease that was not renewed for
`SECONDS`, or whose process is gone from this very machine, is taken over.
Clocks may be wrong: one that looks old, or from the future, is first watched
for half of that time, in which its holder would renew it.

A holder that could not renew for half of that time stops writing: no request
lasts longer than the other half, so nothing of it arrives after another writer
has begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import threading
import time
import uuid
import weakref

from absl import logging
import tensorstore as ts

from mcjax.tree.owner import Owner, refusal
from mcjax.tree.store import Store, io_errors
from mcjax.types import McjaxError

NAME = "mcjax_tree.lease.json"
SECONDS = 60.0  # since it was renewed, until it may be taken over
SKEW = 5.0  # by which the clocks of two machines may differ
GRACE = 0.5  # for what a process that is gone had sent already


@dataclasses.dataclass(frozen=True)
class Lease:
  """What the object says.

  Attributes:
    owner: who holds it.
    process: identity of that process, "" where it cannot be told.
    renewed: when, Unix seconds.
    free: it was given back.
    nonce: makes every version another one.
  """

  owner: Owner
  process: str
  renewed: float
  free: bool
  nonce: str

  @classmethod
  def parse(cls, raw: bytes | None) -> Lease | None:
    """Inverse of `dump`; None if there is none, or it is strange."""
    if raw is None or (owner := Owner.parse(raw)) is None:
      return None
    try:
      fields = json.loads(raw)
      return cls(owner, str(fields["process"]), float(fields["renewed"]),
                 bool(fields["free"]), str(fields["nonce"]))
    except (ValueError, KeyError, TypeError, OverflowError):
      return None

  def dump(self) -> bytes:
    fields = dataclasses.asdict(self)
    return json.dumps({**fields.pop("owner"), **fields}).encode()

  @property
  def is_fresh(self) -> bool:
    """Whether it was renewed lately, as far as clocks tell."""
    return -SKEW < time.time() - self.renewed < SECONDS + SKEW


def process_identity(pid: int | str = "self") -> str:
  """Names a process of a running machine; "" if there is none such."""
  try:
    proc = pathlib.Path("/proc")
    boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
    space = os.readlink(proc / "self/ns/pid")
    number, _, rest = (proc / str(pid) / "stat").read_text().partition(" ")
    state, *fields = rest.rpartition(") ")[2].split()
  except OSError:
    return ""
  started = fields[18]
  return "" if state in "ZX" else f"{boot} {space} {number} {started}"


def is_gone(process: str) -> bool:
  """Whether a process ran on this machine and does not any more."""
  here, then = process_identity().split(), process.split()
  if len(here) != 4 or len(then) != 4 or here[:2] != then[:2]:
    return False
  return process_identity(then[2]) != process


class _Held:
  """A lease in our hands; used by its thread and by the one that writes."""

  def __init__(self, kv: ts.KvStore, url: str, generation: bytes):
    """Takes it. Raises: McjaxError if somebody else was faster."""
    self._kv, self._url, self._generation = kv, url, generation
    self._me, self._process = Owner.here(), process_identity()
    self._pid = os.getpid()
    self._mutex = threading.Lock()
    self.done = threading.Event()
    self.lost = False
    self.renew()
    if self.lost:
      raise refusal(url, None)

  def _write(self, free: bool) -> None:
    value = Lease(
      self._me, self._process, time.time(), free, uuid.uuid4().hex).dump()
    with io_errors("write the lease of", self._url):
      stamp = self._kv.write(NAME, value, if_equal=self._generation).result()
      if not stamp.generation:  # or was it written, and the answer got lost?
        found = self._kv.read(NAME).result()
        stamp = found.stamp
        self.lost = found.state != "value" or bytes(found.value) != value
    self._generation = stamp.generation

  def renew(self) -> None:
    """Renews it, or finds that it is lost. Raises: McjaxError."""
    with self._mutex:
      if self.lost or self.done.is_set():
        return
      begin = time.monotonic(), time.time()
      self._write(free=False)
      self._renewed = begin

  @property
  def age(self) -> float:
    """Seconds since it was renewed, those asleep included."""
    return max(time.monotonic() - self._renewed[0],
               time.time() - self._renewed[1])

  def give_back(self) -> None:
    """Never raises."""
    if os.getpid() != self._pid:  # a fork's lease is still its parent's
      return
    self.done.set()
    with self._mutex, contextlib.suppress(McjaxError):
      if not self.lost:
        self._write(free=True)
      self.lost = True


def _keep(held: _Held) -> None:
  """Renews a lease until it is given back or lost."""
  while not held.done.wait(SECONDS / 4) and not held.lost:
    with contextlib.suppress(McjaxError):  # `check` tells it in time
      held.renew()


def _watch(kv: ts.KvStore, url: str, lease: Lease) -> None:
  """Raises McjaxError if a lease that looks old is renewed nonetheless."""
  logging.warning("%s was held by %s: waiting %.0f s lest it still is", url,
                  lease.owner, SECONDS / 2)
  end = time.monotonic() + SECONDS / 2
  while time.monotonic() < end:
    time.sleep(SECONDS / 16)
    with io_errors("read the lease of", url):
      found = kv.read(NAME).result()
    now = Lease.parse(found.value if found.state == "value" else None)
    if now is not None and not now.free and now.nonce != lease.nonce:
      raise refusal(url, now.owner)


class LeaseLock:
  """A `WriterLock` of a tree on an object store.

  It is given back also when it is forgotten, or the interpreter ends.
  """

  def __init__(self, store: Store):
    """Raises: McjaxError, at once, if another writer holds it."""
    self._url, kv = store.url, store.kv
    with io_errors("read the lease of", store.url):
      found = kv.read(NAME).result()
    lease = Lease.parse(found.value if found.state == "value" else None)
    self.crashed: Owner | None = None
    if lease is not None and not lease.free:
      if is_gone(lease.process):
        time.sleep(GRACE)
      elif lease.is_fresh:
        raise refusal(store.url, lease.owner)
      else:
        _watch(kv, store.url, lease)
      self.crashed = lease.owner
    self._held = _Held(kv, store.url, found.stamp.generation)
    self._finish = weakref.finalize(self, self._held.give_back)
    threading.Thread(
      target=_keep, args=(self._held,), name="mcjax-lease", daemon=True
    ).start()

  def check(self) -> None:
    """Raises McjaxError if the lease is lost, or the server out of reach."""
    if self._held.age > SECONDS / 2:
      self._held.renew()
    if self._held.lost:
      raise McjaxError(
        f"{self._url} was deleted or taken over by another writer: open it"
        " again"
      )

  def release(self) -> None:
    self._finish()
