"""Focus policies: who scores the entries of the working context.

Every policy maps a `FocusView` to one signed score per entry: positive asks
for finer detail, negative for coarser. The hand-written ones are the controls
for, and the fallback of, the learned LensNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mcjax.window.context_lm import ContextLM
from mcjax.window.focus_view import FocusView


class Policy(Protocol):
  """Scores entries.

  Attributes:
    touched, bytes_read: work of the last call of `score`.
  """

  touched: int
  bytes_read: int

  @property
  def sources(self) -> Sequence[tuple[int, int]]:
    """Token spans (start, stop) of the sentences that answer the question.

    Empty where the last query was none, or nothing answers it.
    """

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score in [-1, 1] per entry, [E] float32."""

  def warm_up(self, context: ContextLM) -> None:
    """Compiles what `score` needs, so that nothing compiles in the loop."""


def age_scores(view: FocusView) -> np.ndarray:
  """Scores in (-0.2, 0], older entries lower; all 0.2 lower under pressure.

  So nothing collapses while slots are plenty, and the oldest entries pay for
  new detail once they are not.
  """
  start = view.entries.start()
  cursor = max(int(start[-1]) + 1, 1) if len(start) else 1
  age = 1.0 - (start + view.entries.width() / 2) / cursor
  scores = -0.19 * np.clip(age, 0.0, 1.0) - (0.21 if view.pressure else 0.0)
  return scores.astype(np.float32)


class HostPolicy:
  """A policy that runs on the host: nothing to compile, no tree search."""

  touched = 0
  bytes_read = 0
  sources: Sequence[tuple[int, int]] = ()

  def warm_up(self, context: ContextLM) -> None:
    """Nothing to do."""
