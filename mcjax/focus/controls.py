"""The policies that read nothing: newest in detail, and chance."""

from __future__ import annotations

import numpy as np

from mcjax.focus.policy import HostPolicy, age_scores
from mcjax.window.focus_view import FocusView


class Recency(HostPolicy):
  """Newest in detail: never expands; the oldest collapse when room is short."""

  def score(self, view: FocusView) -> np.ndarray:
    return age_scores(view)


class Random(HostPolicy):
  """Uniform scores: the control that any policy must beat."""

  def __init__(self, seed: int):
    self._rng = np.random.default_rng(seed)

  def score(self, view: FocusView) -> np.ndarray:
    return self._rng.uniform(-1, 1, len(view.entries)).astype(np.float32)
