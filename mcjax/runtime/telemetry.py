"""Telemetry: counters and one record per refocus step, optionally as JSONL."""

from __future__ import annotations

import collections
from collections.abc import Iterator
import contextlib
import json
import resource
import sys
import time
from typing import IO

import jax

from mcjax.types import McjaxError

_KEPT = 256
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_compiles = 0


def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
  global _compiles
  if event == _COMPILE_EVENT:
    _compiles += 1


jax.monitoring.register_event_duration_secs_listener(_on_event)


def compile_count() -> int:
  """Programs compiled in this process so far, or read from the cache."""
  return _compiles


class Telemetry:
  """Counters since the start and the newest records.

  Attributes:
    counters: summed over the session: refocus_steps, edits, expands,
      collapses, lm_tokens (base token-forwards to fill the cache, for
      whatever reason; decoding, probes and counterfactuals apart),
      splice_tokens (those of them after a refocus between decoded blocks),
      decoded_tokens, gist_blocks, nodes_touched, bytes_read.
    seconds: wall-clock seconds per phase (gist, lens, allocate, fetch,
      splice, decode).
    records: the newest 256 step records, dictionaries.
  """

  def __init__(self, path: str | None = None):
    self.counters: collections.Counter[str] = collections.Counter()
    self.seconds: collections.defaultdict[str, float] = (
      collections.defaultdict(float)
    )
    self.records: collections.deque[dict] = collections.deque(maxlen=_KEPT)
    self._lapped: collections.defaultdict[str, float] = (
      collections.defaultdict(float)
    )
    self._file: IO[str] | None = None
    if path is not None:
      try:
        self._file = open(path, "a", encoding="utf-8")
      except OSError as error:
        raise McjaxError(
          f"config.telemetry_path {path}: {error.strerror}"
        ) from None

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Adds the time spent inside to `seconds[name]`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[name] += time.perf_counter() - start

  @property
  def detailed(self) -> bool:
    """Whether records go to a file, and may hold the whole focus."""
    return self._file is not None

  def count(self, name: str, amount: int = 1) -> None:
    """Adds to a counter."""
    self.counters[name] += amount

  def record(self, kind: str, **values) -> None:
    """Keeps one record and appends it to the JSONL file."""
    entry = {"kind": kind, "time": time.time(), **values}
    self.records.append(entry)
    if self._file is not None:
      self._file.write(json.dumps(entry) + "\n")
      self._file.flush()

  def lap(self) -> dict[str, float]:
    """Seconds per phase since the last call."""
    spent = {
      name: round(total - self._lapped[name], 6)
      for name, total in self.seconds.items()
    }
    self._lapped.update(self.seconds)
    return spent

  @property
  def swap_rate(self) -> float:
    """Edits applied per refocus step."""
    steps = self.counters["refocus_steps"]
    return self.counters["edits"] / steps if steps else 0.0

  def summary(self) -> dict:
    """Counters, seconds per phase, swap rate, peak memory in MiB, programs.

    "compiles" are the programs that the process has compiled or read from its
    cache so far.
    """
    return {
      "counters": dict(self.counters),
      "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
      "swap_rate": self.swap_rate,
      "peak_memory_mib": peak_memory_mib(),
      "compiles": compile_count(),
    }

  def close(self) -> None:
    """Closes the JSONL file."""
    if self._file is not None:
      self._file.close()
      self._file = None


def peak_memory_mib() -> float:
  """Peak resident memory of this process so far, MiB."""
  try:  # what getrusage tells on Linux begins with the parent's peak
    with open("/proc/self/status", encoding="ascii") as status:
      for line in status:
        if line.startswith("VmHWM:"):
          return int(line.split()[1]) / 2**10
  except OSError:
    pass
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / (2**20 if sys.platform == "darwin" else 2**10)
