"""Graceful stop of a training run."""

from __future__ import annotations

import signal


class StopSignal:
  """Turns SIGTERM and SIGINT into a flag while its block runs."""

  def __enter__(self):
    self.raised = False
    self._before = {
      s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _note(self, number, frame):
    del number, frame
    self.raised = True

  def __exit__(self, *unused):
    for number, handler in self._before.items():
      signal.signal(number, handler)
