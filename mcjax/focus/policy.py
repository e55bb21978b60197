"""Focus policies: who scores the entries of the working context.

Every policy maps a `FocusView` to one signed score per entry: positive asks
for finer detail, negative for coarser. The hand-written ones are the controls
for, and the fallback of, the learned LensNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM
from mcjax.window.focus_view import FocusView

WISH = 0.2  # tau, the allocator's: scores beyond it ask for an edit
STAY = 0.01 - WISH  # the least score of what does not collapse by itself
_COST = BRANCHING - 1  # slots of an expand


class Policy(Protocol):
  """Scores entries.

  Attributes:
    touched, bytes_read: work of the last call of `score`.
    sources: token spans (start, stop) that answer the prompt, in order, as far
      as the history holds an answer.
    answerable: how surely it does, in [0, 1].
    denies: whether learned weights say that it does not.
  """

  touched: int
  bytes_read: int
  answerable: float
  denies: bool

  @property
  def sources(self) -> Sequence[tuple[int, int]]:
    """See the class."""
    ...

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score in [-1, 1] per entry, [E] float32."""
    ...

  def take_in(self, tree: MegaContextTree, context: ContextLM) -> None:
    """Reads what a prompt will need of a long text that came to `tree`."""
    ...

  def warm_up(self, context: ContextLM) -> None:
    """Compiles what `score` needs, so that nothing compiles in the loop."""
    ...


def age_scores(view: FocusView) -> np.ndarray:
  """Scores from 0 down to `STAY`, older entries lower.

  So nothing collapses on its own account, and where slots are short the oldest
  entries pay.
  """
  start = view.entries.start()
  cursor = max(int(start[-1]) + 1, 1) if len(start) else 1
  age = 1.0 - (start + view.entries.width() / 2) / cursor
  return (STAY * np.clip(age, 0.0, 1.0)).astype(np.float32)


def with_payment(view: FocusView, scores: np.ndarray) -> np.ndarray:
  """Lowers the scores of the sibling groups that should collapse, [E].

  An expand takes 31 slots, and a collapse of 32 siblings frees 31. Where the
  slots of an expand are not free, a group of siblings is scored below the
  threshold, so that the allocator collapses it: the group of the lowest mean
  score first, at most as many as one step can trade, and never a group that
  scores as high as the entry whose expand it would pay for.
  """
  wishes = np.sort(scores[view.can_expand & (scores > WISH)])[::-1]
  trades = max(1, view.max_edits // 2)  # a trade is two edits
  paid = max(0, view.room // _COST)  # expands that free slots pay for
  wishes = wishes[paid : max(paid, min(len(wishes), trades))]
  if not len(wishes):
    return scores
  total = np.concatenate([[0.0], np.cumsum(scores, dtype=np.float64)])
  first = np.flatnonzero(view.can_collapse)
  mean = (total[first + BRANCHING] - total[first]) / BRANCHING
  out, chosen = scores.copy(), []
  for at in first[np.argsort(mean, kind="stable")].tolist():
    if len(chosen) == len(wishes):
      break
    worth = scores[at : at + BRANCHING].mean()
    if worth >= wishes[len(chosen)]:
      break
    if all(abs(at - other) >= BRANCHING for other in chosen):
      chosen.append(at)
      out[at : at + BRANCHING] = np.minimum(
        out[at : at + BRANCHING] - worth - WISH - 1e-3,
        -WISH - 1e-3).astype(np.float32)
  return out


class HostPolicy:
  """A policy that runs on the host: nothing to compile, no tree search."""

  touched = 0
  bytes_read = 0
  answerable = 0.0
  denies = False

  @property
  def sources(self) -> Sequence[tuple[int, int]]:
    """Nothing is read."""
    return ()

  def take_in(self, tree: MegaContextTree, context: ContextLM) -> None:
    """Nothing to read."""

  def warm_up(self, context: ContextLM) -> None:
    """Nothing to do."""
