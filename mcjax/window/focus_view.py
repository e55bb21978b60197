"""What a focus policy may look at: the window, the history and the query."""

from __future__ import annotations

import dataclasses

import numpy as np

from mcjax.tree.tree import MegaContextTree
from mcjax.window.context_lm import ContextLM
from mcjax.window.working_context import Entries

_FADE = 64.0  # tokens over which a query token loses half its weight


@dataclasses.dataclass
class FocusView:
  """What a policy may look at; nothing here grows with the history.

  Attributes:
    entries: the window's entries.
    tree: the history.
    query_ids: [Q] int32 newest tokens that say what matters now.
    query_weights: [Q] float32 their weights.
    query_start: first token of the history that belongs to the query; spans
      from here on are no answer to it.
    asked: the query is a prompt, not just the newest text.
    step: refocus step.
    can_expand, can_collapse: [E] bool, entries that may be expanded, and first
      entries of 32 siblings that may be collapsed.
    room: free slots beyond those that the next block needs; may be negative.
    max_edits: of this step.
    context_lm: the LM's window, for policies that look at embeddings or at
      counterfactual losses.
    continuation: [H] int32 true next tokens, known in `score` only.
    query_before: [B] int32 what the user said before a prompt, if anything.
  """

  entries: Entries
  tree: MegaContextTree
  query_ids: np.ndarray
  query_weights: np.ndarray
  query_start: int
  asked: bool
  step: int
  can_expand: np.ndarray
  can_collapse: np.ndarray
  room: int
  max_edits: int
  context_lm: ContextLM
  continuation: np.ndarray | None = None
  query_before: np.ndarray | None = None


def fading_weights(count: int) -> np.ndarray:
  """Weights of the newest `count` tokens, halved every 64 tokens of age."""
  age = np.arange(count - 1, -1, -1)
  return (0.5 ** (age / _FADE)).astype(np.float32)
