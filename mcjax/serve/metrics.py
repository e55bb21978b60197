"""Counters of the server, in Prometheus' text format."""

from __future__ import annotations

import bisect
import threading

_EDGES = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
  """Requests, tokens, and seconds to the first token; thread-safe."""

  def __init__(self):
    self._lock = threading.Lock()
    self._requests: dict[tuple[str, int], int] = {}
    self._counts = {"tokens_decoded": 0, "tokens_prompted": 0, "answers": 0}
    self._buckets = [0] * (len(_EDGES) + 1)
    self._seconds = 0.0

  def request(self, route: str, status: int) -> None:
    """Counts a request."""
    with self._lock:
      key = route, status
      self._requests[key] = self._requests.get(key, 0) + 1

  def answer(self, prompted: int, decoded: int, first: float) -> None:
    """Counts an answer: its tokens, and seconds to its first one."""
    with self._lock:
      self._counts["answers"] += 1
      self._counts["tokens_prompted"] += prompted
      self._counts["tokens_decoded"] += decoded
      self._buckets[bisect.bisect_left(_EDGES, first)] += 1
      self._seconds += first

  def text(self, **gauges: float) -> str:
    """All of it, with the values of `gauges` as they are now."""
    with self._lock:
      lines = ["# TYPE mcjax_requests_total counter"]
      for (route, status), n in sorted(self._requests.items()):
        lines.append(
          f'mcjax_requests_total{{route="{route}",status="{status}"}} {n}')
      for name, n in self._counts.items():
        lines += [f"# TYPE mcjax_{name}_total counter",
                  f"mcjax_{name}_total {n}"]
      lines.append("# TYPE mcjax_first_token_seconds histogram")
      total = 0
      for edge, n in zip((*map(str, _EDGES), "+Inf"), self._buckets):
        total += n
        lines.append(
          f'mcjax_first_token_seconds_bucket{{le="{edge}"}} {total}')
      lines += [f"mcjax_first_token_seconds_sum {self._seconds:.6f}",
                f"mcjax_first_token_seconds_count {total}"]
      for name, value in gauges.items():
        lines += [f"# TYPE mcjax_{name} gauge", f"mcjax_{name} {value}"]
    return "\n".join(lines) + "\n"
