"""What blocks are worth to text that is read on, measured by splicing.

A window of the base follows a text, led by the policy that training starts
from. Every few steps the true next tokens are scored against the window as it
is, with one far block more, and with one raw block less, as edits would have
it. What the block saves, less what its slots would have saved as recent text,
is its label. One backward pass estimates the same to first order for every
other raw block that may be collapsed. Other blocks have no label.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mcjax.config import Config
from mcjax.lens import features as lens_features
from mcjax.lens import network as lensnet
from mcjax.lens.features import GIST, NAMES, RAW, Rows
from mcjax.lens.policy import LensNetPolicy
from mcjax.runtime.focus_loop import FocusLoop
from mcjax.runtime.telemetry import Telemetry
from mcjax.training.lens.prompts import Example, History
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM
from mcjax.window.counterfactual import (
  Candidate,
  edit_losses,
  slot_gradients,
)
from mcjax.window.working_context import COLLAPSE, EXPAND, WorkingContext

# What 31 slots of recent text save, in nats a token: a window of 1,024 less one
# of 896 is 0.006 (docs/trials/text.md).
_SLOTS = 0.0015
_SCALE = 10.0  # a label of 1 is 0.1 nats a token of the next 64, or more
# What a raw block saves by splicing over its first-order estimate, the median
# slope of 12 windows (docs/trials/text.md).
_SLOPE = 0.87
_TOGETHER = 4  # candidates in one batch
_BEST = {"score": 6, "repeats": 4, "times_near": 4, "key_near": 2}
_ANY, _RAW = 4, 4  # others far away, and raw blocks


class Effects:
  """Follows texts with the base, and measures blocks.

  Args:
    lm: the base.
    encoder: the GistNet of the trees; gists are seen as its card says.
    policy: leads the window.
    window: slots of the window.
  """

  def __init__(self, lm, encoder, policy: LensNetPolicy, window: int = 1024):
    self._policy, self._encoder = policy, encoder
    self._config = Config(window=window)
    self._context = ContextLM.reading(lm, self._config, encoder)
    policy.bind(encoder, self._config)
    policy.warm_up(self._context)

  def follow(self, tree: MegaContextTree, history: History
             ) -> Iterator[tuple[Example, WorkingContext]]:
    """Reads on to each example in turn; the window as it is there.

    `label` may be asked before the next one.
    """
    first = history.examples[0].cursor
    tree.append(history.ids[tree.cursor : first - BRANCHING])
    self._context.window.retile([])
    self._context.forget()
    self._loop = FocusLoop(tree, self._context, self._policy, self._encoder,
                           self._config, Telemetry())
    self._loop.cold_start()
    for example in history.examples:
      while tree.cursor < example.cursor:
        self._loop.append(history.ids[tree.cursor : tree.cursor + BRANCHING])
        self._loop.sync(renew=BRANCHING + 1)
        self._loop.follow()
        if tree.cursor < example.cursor:
          self._loop.refocus_deeper()
      yield example, self._context.window
      self._loop.refocus_deeper()

  def label(self, rows: Rows, features: np.ndarray, scores: np.ndarray,
            future: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels [R] in [-1, 1] of some rows of the window; NaN for the others.

    Those of `_tried` are exact, other raw blocks' are first-order estimates.

    Args:
      rows: of the window, see `lens.features.window_rows`.
      features: [R, FEATURES] of them.
      scores: [R] what the policy thinks of them.
      future: [H] int32 true next tokens.
      rng: draws what is tried besides the promising ones.
    """
    legal = self._loop.view().can_collapse
    raw = np.flatnonzero(rows.state == RAW)
    raw = raw[legal[rows.entry[raw]]]
    tried = _tried(rows, raw, features, scores, rng)
    candidates = [
      Candidate(COLLAPSE, int(rows.entry[i])) if rows.state[i] == RAW else
      Candidate(EXPAND, int(rows.entry[i]), int(rows.block[i])) for i in tried]
    out = np.full(len(rows), np.nan, np.float32)
    if len(raw):
      saved = slot_gradients(self._context, self._loop.tree, future)
      ends = np.add.accumulate(np.append(0, saved))
      first = rows.entry[raw]
      out[raw] = _labels(_SLOPE * (ends[first + BRANCHING] - ends[first]))
    if candidates:
      base, losses = edit_losses(
        self._context, self._loop.tree, candidates, future,
        pad_to=_TOGETHER, together=_TOGETHER)
      without = np.where(rows.state[tried] == RAW, losses, base)
      with_it = np.where(rows.state[tried] == RAW, base, losses)
      out[tried] = _labels(without - with_it)
    return out

  def scores(self, inputs: lens_features.LensInputs) -> np.ndarray:
    """What the policy thinks of the rows of a window, [R] in [-1, 1]."""
    none = np.zeros(len(lensnet.APART), np.float32)
    return np.asarray(lensnet.apply(
      self._policy.params["text"], none, self._policy.config, inputs)[0])


def _labels(saved: np.ndarray) -> np.ndarray:
  """What blocks save, in nats a token, as labels in [-1, 1]."""
  return np.clip(_SCALE * (saved - _SLOTS), -1.0, 1.0)


def _tried(rows: Rows, raw: np.ndarray, features: np.ndarray,
           scores: np.ndarray, rng: np.random.Generator) -> list[int]:
  """Rows to be tried: promising ones, some others, some raw ones.

  By what a policy may know alone, so that what they gain on average is what a
  policy that takes them gains.
  """
  far = np.flatnonzero(rows.state >= GIST)
  chosen: list[int] = []
  for name, count in _BEST.items():
    values = scores if name == "score" else features[:, NAMES.index(name)]
    order = far[np.argsort(-values[far], kind="stable")]
    chosen += [i for i in order.tolist() if i not in chosen][:count]
  chosen += [i for i in rng.permutation(far).tolist() if i not in chosen][:_ANY]
  return chosen + rng.permutation(raw)[:_RAW].tolist()

