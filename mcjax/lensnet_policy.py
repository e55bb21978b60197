"""LensNet as a focus policy: gathers entries and tail, returns scores."""

from __future__ import annotations

import numpy as np

from mcjax import lensnet
from mcjax.base.load import BaseLM
from mcjax.context_lm import ContextLM
from mcjax.gistnet import GistEncoder
from mcjax.lensnet import FEATURES, TAIL, TAIL_GISTS
from mcjax.policies import FocusView
from mcjax.types import BRANCHING


class LensNetPolicy:
  """Focus scores from LensNet, in slot order on the device.

  Attributes:
    trained: False for the deterministic untrained weights.
  """

  touched = 0
  bytes_read = 0

  def __init__(self, config: lensnet.LensNetConfig, params,
               encoder: GistEncoder, trained: bool):
    self.config, self.params, self.trained = config, params, trained
    self._encoder = encoder

  def score(self, view: FocusView) -> np.ndarray:
    """Signed score per entry, [E] float32."""
    lens_lm: ContextLM = view.context_lm
    lens_lm.load_unready(view.tree)
    e = view.entries
    slots = lens_lm.window.window
    features = np.zeros((slots, FEATURES), np.float32)
    mask = np.zeros(slots, bool)
    features[e.slot] = lensnet.entry_features(
      e.level, e.start(), e.width(), view.tree.cursor
    )
    mask[e.slot] = True
    tail, tail_mask = self._tail(view, lens_lm)
    scores = lensnet.apply(
      self.params, self.config, lens_lm.state.inputs, features, mask, tail,
      tail_mask,
    )
    return np.asarray(scores)[e.slot]

  def warm_up(self, context: ContextLM) -> None:
    """Compiles LensNet for this window."""
    slots = context.window.window
    lensnet.apply(
      self.params, self.config, context.state.inputs,
      np.zeros((slots, FEATURES), np.float32), np.zeros(slots, bool),
      np.zeros((TAIL, self.config.d_model), np.float32), np.zeros(TAIL, bool),
    )
    context.token_embeddings(np.zeros(BRANCHING, np.int32))

  def _tail(self, view: FocusView, lens_lm: ContextLM):
    """Coarsest and newest gists, the provisional gist, the newest tokens."""
    tree = view.tree
    d = self.config.d_model
    tail = np.zeros((TAIL, d), np.float32)
    mask = np.zeros(TAIL, bool)
    gists = []
    if tree.top_level > 1:
      count = tree.num_nodes(tree.top_level)
      gists.append(tree.gists(tree.top_level, max(0, count - 2), count))
    count = tree.num_nodes(1)
    gists.append(tree.gists(1, max(0, count - 4), count))
    rows = np.concatenate(gists)[:TAIL_GISTS]
    tail[: len(rows)] = rows
    mask[: len(rows)] = True
    newest = tree.tokens(max(0, tree.cursor - BRANCHING), tree.cursor)
    if len(newest) == BRANCHING:
      tail[TAIL_GISTS] = self._encoder.encode_tokens(newest[None])[0]
      mask[TAIL_GISTS] = True
    ids = np.zeros(BRANCHING, np.int32)
    ids[: len(newest)] = newest
    tail[TAIL_GISTS + 1 :] = lens_lm.token_embeddings(ids)
    mask[TAIL_GISTS + 1 : TAIL_GISTS + 1 + len(newest)] = True
    return tail, mask


def load_lensnet(lm: BaseLM, encoder: GistEncoder) -> LensNetPolicy:
  """The lens for a base; deterministic untrained weights."""
  config = lensnet.LensNetConfig(d_model=lm.config.d_model)
  return LensNetPolicy(
    config, lensnet.init_params(config), encoder, trained=False
  )
