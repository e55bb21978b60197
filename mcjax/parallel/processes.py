"""The processes of one run: how they join, stop together and miss each other.

JAX's own coordination service carries everything: `jax.distributed` joins the
processes, its preemption notice agrees on the step at which all of them stop,
and its key-value store tells who is alive.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time

import jax
from jax._src import distributed  # the service's client has no public name
from jax.experimental import multihost_utils

from mcjax.types import McjaxError

STOPPED = 75  # exit status after a signal: saved, start again to go on
PEER_LOST = 76  # exit status after another process of the run went missing
_BEAT = 3.0  # seconds between two signs of life
_SILENCE = 40.0  # seconds without one after which a process is lost
_ALIVE = "mcjax/alive/"

_LONGEST = 24 * 3600 * 1000  # milliseconds that processes wait for another

_polls = itertools.count(1)
_barriers = itertools.count(1)
_kept: list = []  # the C library's handler of aborts, while the process lives


def join(coordinator: str | None = None, count: int | None = None,
         process: int | None = None, timeout: int = 300) -> None:
  """Makes this process one of many; before anything else of JAX is used.

  Args:
    coordinator: HOST:PORT of process 0; like the others, found by itself on a
      TPU pod, under Slurm, Open MPI and Kubernetes.
    count: number of processes.
    process: number of this one, from 0.
    timeout: seconds to wait for the others.

  Raises:
    McjaxError: the arguments do not fit, or not all processes came.
  """
  # A lost process is told by name below, not by an abort of the runtime.
  jax.config.update("jax_enable_recoverability", True)
  try:
    jax.distributed.initialize(
      coordinator, count, process, initialization_timeout=timeout,
      shutdown_timeout_seconds=30)
    jax.devices()
  except (ValueError, RuntimeError, TypeError) as error:
    reason = str(error).strip().splitlines()[0]
    raise McjaxError(
      f"the processes of this run did not come together: {reason}; see "
      "--coordinator, --num_processes and --process_id") from error
  if not is_first():
    _told_of_aborts(str(distributed.global_state.coordinator_address))
  _Watch().start()


def is_first() -> bool:
  """Whether this process is the one that writes and reports."""
  return jax.process_index() == 0


def is_mine(number: int) -> bool:
  """Whether this process does number `number` of tasks that all share."""
  return number % jax.process_count() == jax.process_index()


def barrier(name: str) -> None:
  """Waits until all processes are here, for hours if need be.

  Communication between CPUs gives up after 30 seconds; the coordination service
  is asked first, since tasks that processes share take unequally long.
  """
  if jax.process_count() > 1:
    client = _client()
    if client is not None:
      client.wait_at_barrier(f"{name} {next(_barriers)}", _LONGEST)
    multihost_utils.sync_global_devices(name)


def _client():
  return distributed.global_state.client


class _Watch(threading.Thread):
  """Shows that this process lives, and ends it when another does not."""

  def __init__(self):
    super().__init__(name="peers", daemon=True)
    self._seen: dict[int, tuple[str, float]] = {}
    self._answered = time.monotonic()

  def run(self) -> None:
    for beat in itertools.count():
      lost = self._look(beat)
      if lost:
        _end(lost)
      time.sleep(_BEAT)

  def _look(self, beat: int) -> str | None:
    """One sign of life; a sentence about a process that is lost."""
    client, own = _client(), jax.process_index()
    if client is None:  # the run is over
      return None
    try:
      client.key_value_set(f"{_ALIVE}{own}", str(beat), allow_overwrite=True)
      signs = dict(client.key_value_dir_get(_ALIVE))
    except Exception as error:  # XlaRuntimeError; has no public base class
      if _client() is None or "NOT_FOUND" in str(error):
        return None
      if time.monotonic() - self._answered > _SILENCE / 2:
        return "process 0, which coordinates the run, does not answer"
      return None
    now = self._answered = time.monotonic()
    for other in range(jax.process_count()):
      sign = signs.get(f"{_ALIVE}{other}", "")
      if sign.startswith("failed"):
        return f"process {other} ended: {sign.removeprefix('failed ')}"
      before, since = self._seen.get(other, ("", now))
      if sign != before or sign == "left":
        since = now
      self._seen[other] = sign, since
      if now - since > _SILENCE:
        return f"process {other} gave no sign of life for {_SILENCE:.0f} s"
    return None


def _told_of_aborts(coordinator: str) -> None:
  """Makes the loss of process 0 an error in one line.

  JAX's runtime aborts at once where the coordinating process is gone, and
  offers no callback that can be written in Python.
  """

  def aborted(number: int) -> None:
    host, port = coordinator.rsplit(":", 1)
    try:
      socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except OSError:
      _end("process 0, which coordinates the run, is gone")

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
  _kept.append(handler)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def _end(why: str) -> None:
  print(f"error: {why}. Process {jax.process_index()} of "
        f"{jax.process_count()} stops; start the run again and it goes on from "
        "its last checkpoint.", file=sys.stderr, flush=True)
  os._exit(PEER_LOST)


def leave(status: int = 0, error: str | None = None) -> None:
  """Parts from the others, and ends the process if it is one of many.

  Process 0 holds the service and goes last; all others end at once.

  Args:
    status: exit status of the process.
    error: a mistake for which this process ends before the others, which end
      because of it.
  """
  client = _client()
  if client is None:
    return
  sys.stdout.flush()
  sys.stderr.flush()
  key = f"{_ALIVE}{jax.process_index()}"
  if error is not None:
    client.key_value_set(key, f"failed {error}", allow_overwrite=True)
    time.sleep(2 * _BEAT if is_first() else 0)
    os._exit(status)
  barrier("the end")
  if not is_first():
    client.key_value_set(key, "left", allow_overwrite=True)
    os._exit(status)
  until = time.monotonic() + _SILENCE
  while time.monotonic() < until:
    signs = dict(client.key_value_dir_get(_ALIVE))
    if sum(s == "left" for s in signs.values()) == jax.process_count() - 1:
      break
    time.sleep(0.1)
  os._exit(status)


def lost_peer(error: Exception) -> None:
  """Waits for the word on a lost process after a failed communication.

  Returns if all processes are found alive: the error has another cause.
  """
  if _client() is not None:
    print(f"communication failed ({str(error).splitlines()[0]}); looking for "
          "the cause ...", file=sys.stderr, flush=True)
    time.sleep(_SILENCE + 3 * _BEAT)  # the watching thread ends the process


class Stopped(Exception):
  """A signal ended the work; what was done is kept."""


class StopSignal:
  """Asks at every step whether to stop; a block's SIGTERM and SIGINT.

  In a run of many processes a signal to any of them stops all at one step:
  every process must ask equally often. There SIGTERM belongs to JAX, from
  `join` on; a signal is never forgotten before the next question.

  Attributes:
    raised: whether it is time to stop, as of the last question.
  """

  def __enter__(self):
    self.raised = self._noted = False
    self._many = jax.process_count() > 1
    numbers = [signal.SIGINT] if self._many else [signal.SIGTERM, signal.SIGINT]
    self._before = {s: signal.signal(s, self._note) for s in numbers}
    return self

  def _note(self, number, frame):
    del number, frame
    self._noted = True
    if self._many:
      os.kill(os.getpid(), signal.SIGTERM)

  def reached(self) -> bool:
    """Whether to stop now; to be asked once a step in every process."""
    if self._many:
      self.raised |= multihost_utils.reached_preemption_sync_point(
        next(_polls))
    else:
      self.raised |= self._noted
    return self.raised

  def check(self) -> None:
    """As `reached`. Raises: Stopped, where there is nothing to save."""
    if self.reached():
      raise Stopped

  def __exit__(self, *unused):
    for number, handler in self._before.items():
      signal.signal(number, handler)
