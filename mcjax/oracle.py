"""Oracle policy: counterfactual change in NLL of the true continuation.

The control that knows the future: each candidate edit is tried by splicing,
the next tokens are scored, and the window is put back. Only `score` knows the
continuation; this policy is for measurement, not for use.
"""

from __future__ import annotations

import numpy as np

from mcjax import focus_allocator
from mcjax.config import Config
from mcjax.context_lm import ContextLM
from mcjax.policies import FocusView, Similarity, age_scores
from mcjax.types import BRANCHING, McjaxError

_HORIZON = 32  # tokens of the continuation scored per candidate
_CANDIDATES = 6  # expands tried, and as many collapses
_SCALE = 10.0  # tanh(10 * 0.02 nats) is about the threshold 0.2


class Oracle:
  """Scores of a few candidate edits by trying them.

  Candidates are the expands that similarity asks for, then the newest coarse
  entries, and the oldest collapsible groups; all other entries score by age.
  """

  def __init__(self, config: Config):
    self._config = config
    self._similar = Similarity(config.search_nodes)
    self.touched = 0
    self.bytes_read = 0

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score per entry, [E] float32; see the module docstring.

    Raises:
      McjaxError: the continuation is not known.
    """
    if view.continuation is None:
      raise McjaxError(
        "policy oracle needs the true continuation: it works in score only"
      )
    context: ContextLM = view.context_lm
    tokens = view.continuation[:_HORIZON]
    scores = age_scores(view)
    wished = self._similar.score(view)
    self.touched = self._similar.touched
    self.bytes_read = self._similar.bytes_read
    if not len(tokens):
      return scores
    legal = focus_allocator.legal_edits(
      context.window, step=view.step, cooldown=self._config.cooldown,
      sink=self._config.sink_tokens, protect=self._config.protect_tokens,
    )
    count = len(view.entries)
    expands = np.flatnonzero(legal.expand[:count])
    expands = expands[np.argsort(-wished[expands], kind="stable")]
    collapses = np.flatnonzero(legal.collapse[:count])
    need = BRANCHING - 1 + len(tokens)
    base = self._nll(context, view, tokens, None, collapses, need)
    for at in expands[:_CANDIDATES]:
      gain = base - self._nll(
        context, view, tokens, (focus_allocator.EXPAND, at), collapses, need
      )
      scores[at] = np.tanh(_SCALE * gain)
    for at in collapses[:_CANDIDATES]:
      loss = self._nll(
        context, view, tokens, (focus_allocator.COLLAPSE, at), collapses, need
      ) - base
      scores[at : at + BRANCHING] = np.tanh(_SCALE * (loss - 0.02))
    return scores

  def warm_up(self, context: ContextLM) -> None:
    """Nothing beyond the window's own shapes."""

  def _nll(self, context, view, tokens, edit, collapses, need) -> float:
    """Mean NLL of `tokens` after `edit` (action, entry), undone afterwards.

    Where slots are short the oldest other groups are collapsed first, for the
    base line as for every edit.
    """
    snapshot = context.snapshot()
    window = context.window
    starts = view.entries.start()
    levels = view.entries.level
    try:
      spared = int(edit[1]) if edit is not None else -BRANCHING
      for group in collapses:
        if window.free >= need:
          break
        if abs(int(group) - spared) >= BRANCHING:
          window.collapse(_row(window, starts[group]), view.step)
      if edit is not None:
        action, at = edit
        row = _row(window, starts[at])
        if action == focus_allocator.COLLAPSE:
          window.collapse(row, view.step)
        elif int(levels[at]) > 0:
          window.expand(row, view.step)
      room = min(len(tokens), window.free)
      context.append_unremembered(tokens[:room], view.tree)
      context.sync(renew=room + 1)
      return float(np.nanmean(context.newest_nll(tokens[:room])))
    finally:
      context.restore(snapshot)


def _row(window, start: int) -> int:
  return int(np.searchsorted(window.entries.start(), start))
