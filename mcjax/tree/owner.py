"""Who holds a tree open for writing."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time

from mcjax.types import McjaxError


@dataclasses.dataclass(frozen=True)
class Owner:
  """Who holds a tree open for writing, and since when (Unix seconds)."""

  pid: int
  host: str
  since: float

  @classmethod
  def here(cls) -> Owner:
    return cls(os.getpid(), socket.gethostname(), time.time())

  @classmethod
  def parse(cls, raw: bytes | str) -> Owner | None:
    """Inverse of `dump`; None if it is cut or strange."""
    try:
      fields = json.loads(raw)
      return cls(
        int(fields["pid"]), str(fields["host"])[:100], float(fields["since"])
      )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
      return None

  def dump(self) -> str:
    return json.dumps(dataclasses.asdict(self))

  def __str__(self) -> str:
    age = max(0.0, time.time() - self.since)
    return f"process {self.pid} on {self.host} for {_duration(age)}"


def _duration(seconds: float) -> str:
  for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
    if seconds >= 2 * size:
      return f"{seconds / size:.0f} {unit}"
  return f"{seconds:.0f} s"


def refusal(url: str, owner: Owner | None) -> McjaxError:
  """What a second writer is told."""
  by = f" by {owner}" if owner else ""
  return McjaxError(
    f"{url} is open for writing{by}: close it there first, or open it with"
    ' mode="r"'
  )
