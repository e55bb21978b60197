"""Oracle policy: counterfactual change in NLL of the true continuation.

The control that knows the future: each candidate edit is tried as a splice and
the next tokens are scored. Only `score` knows the continuation; this policy is
for measurement, not for use.
"""

from __future__ import annotations

import numpy as np

from mcjax.config import Config
from mcjax.focus import allocator as focus_allocator
from mcjax.focus.policy import age_scores
from mcjax.focus.similarity import Similarity
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, McjaxError
from mcjax.window.context_lm import ContextLM
from mcjax.window.counterfactual import Candidate, edit_losses
from mcjax.window.focus_view import FocusView
from mcjax.window.working_context import COLLAPSE, EXPAND

_HORIZON = 32  # tokens of the continuation scored per candidate
_CANDIDATES = 6  # expands tried, and as many collapses
_FREE_LOSS = 0.02  # nats a token that a freed slot is worth
_SCALE = 10.0  # tanh(10 * 0.02 nats) is about the threshold 0.2


class Oracle:
  """Scores of a few candidate edits by trying them.

  Candidates are the expands that similarity asks for, then the newest coarse
  entries, and the oldest collapsible groups; all other entries score by age.
  """

  denies = False

  def __init__(self, config: Config):
    self._config = config
    self._similar = Similarity(config.search_nodes)
    self.touched = 0
    self.bytes_read = 0
    self.answerable = 0.0
    self.sources: tuple[tuple[int, int], ...] = ()

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score per entry, [E] float32; see the module docstring.

    Raises:
      McjaxError: the continuation is not known.
    """
    if view.continuation is None:
      raise McjaxError(
        "policy oracle needs the true continuation: it works in score only"
      )
    context = view.context_lm
    scores = age_scores(view)
    wished = self._similar.score(view)
    self.touched = self._similar.touched
    self.bytes_read = self._similar.bytes_read
    if not len(view.continuation):
      return scores
    legal = focus_allocator.legal_edits(
      context.window, step=view.step, cooldown=self._config.cooldown,
      sink=self._config.sink_tokens, protect=self._config.protect_tokens,
    )
    count = len(view.entries)
    expands = np.flatnonzero(legal.expand[:count])
    expands = expands[np.argsort(-wished[expands], kind="stable")]
    collapses = np.flatnonzero(legal.collapse[:count])
    candidates = [
      *(Candidate(EXPAND, int(at)) for at in expands[:_CANDIDATES]),
      *(Candidate(COLLAPSE, int(at)) for at in collapses[:_CANDIDATES]),
    ]
    context.load_unready(view.tree)
    context.sync(renew=0)
    base, losses = edit_losses(
      context, view.tree, candidates, view.continuation[:_HORIZON],
      pad_to=_CANDIDATES,
    )
    for (action, at, _), loss in zip(candidates, losses):
      if action == EXPAND:
        scores[at] = np.tanh(_SCALE * (base - loss))
      else:
        scores[at : at + BRANCHING] = np.tanh(
          _SCALE * (loss - base - _FREE_LOSS)
        )
    return scores

  def take_in(self, tree: MegaContextTree, context: ContextLM) -> None:
    """As `Similarity`."""
    self._similar.take_in(tree, context)

  def warm_up(self, context: ContextLM) -> None:
    """Nothing beyond the window's own shapes."""
