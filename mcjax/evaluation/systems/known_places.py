"""A policy that is told where the answer is: an upper bound, never for use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcjax.focus.policy import age_scores, with_payment
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM
from mcjax.window.focus_view import FocusView


class KnownPlaces:
  """Wants the blocks of given places at L0; everything else pays, oldest first.

  To a question the places are the answer.

  What remains between it and a perfect hit is the allocator: edits per step,
  budget, cooldown.

  Attributes:
    places: token spans (start, stop) of the timeline; may be replaced.
  """

  touched = 0
  answerable, denies = 1.0, False
  bytes_read = 0

  def __init__(self, places: Sequence[tuple[int, int]] = ()):
    self.places = tuple(places)

  @property
  def sources(self) -> Sequence[tuple[int, int]]:
    """The places."""
    return self.places

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score per entry, [E] float32."""
    scores = age_scores(view)
    start = view.entries.start()
    stop = start + view.entries.width()
    # One edit from L0 first: coarse entries need several steps to show a token.
    wanted = np.maximum(1.0 - 0.1 * np.maximum(view.entries.level - 1, 0), 0.5)
    for a, b in self.places:
      low, high = a // BRANCHING * BRANCHING, -(-b // BRANCHING) * BRANCHING
      inside = (start < high) & (stop > low)
      scores[inside] = wanted[inside]
    return with_payment(view, scores)

  def take_in(self, tree: MegaContextTree, context: ContextLM) -> None:
    """Nothing to read."""

  def warm_up(self, context: ContextLM) -> None:
    """Nothing to compile."""
