"""Undo: what has become of a cache since a snapshot of its window."""

from __future__ import annotations

import numpy as np

from mcjax.window.working_context import WorkingContext


class Undo:
  """Follows slots, so that a window's earlier bookkeeping can be taken up.

  Attributes:
    written: [S] bool, slots whose contents are new.
  """

  def __init__(self, slots: int):
    self.written = np.zeros(slots, bool)
    self._place = np.arange(slots)  # where each slot's contents are now

  def permute(self, order: np.ndarray) -> None:
    """Slots have changed places; `order` [S] is its own inverse."""
    self.written = self.written[order]
    self._place = order[self._place]

  def amend(self, window: WorkingContext) -> None:
    """Lets a window of then use the cache of now.

    Entries whose keys and values are overwritten become unready.
    """
    window.permute(self._place)
    e = window.entries
    e.ready &= ~self.written[e.slot]
