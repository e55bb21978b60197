"""Where the newest text repeats an earlier passage, and what came next there.

A small model copies what follows a passage much like the newest tokens. That
helps where both passages run in step, token against token, and misleads where
they merely share words. So the newest tokens are laid along the text of
candidate blocks, and a place counts by the tokens that agree position by
position.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING

SPAN = 48  # newest tokens that are laid along a passage
_HALF = 16.0  # tokens of age over which an agreement counts half


def span_weights(rarity: np.ndarray) -> np.ndarray:
  """Weights [n] of agreeing tokens by rarity [n] and age, 1 in all."""
  age = np.arange(len(rarity) - 1, -1, -1)
  weights = rarity * 0.5 ** (age / _HALF)
  return weights / max(float(weights.sum()), 1e-9)


def agreements(ids: np.ndarray, newest: np.ndarray, weights: np.ndarray
               ) -> np.ndarray:
  """Shares [N - n + 1] of the weight at which `newest` agrees with `ids`.

  Args:
    ids: [N] token ids.
    newest: [n] token ids.
    weights: [n], see `span_weights`.

  Returns:
    Entry i compares ids[i : i + n]; empty where ids are fewer than n.
  """
  if len(ids) < len(newest):
    return np.zeros(0)
  spans = np.lib.stride_tricks.sliding_window_view(ids, len(newest))
  return (spans == newest[None]) @ weights


def continuations(
  tree: MegaContextTree, blocks: Iterable[int], newest: np.ndarray,
  weights: np.ndarray, stop: int,
) -> dict[int, float]:
  """Blocks that continue a passage in step with the newest tokens.

  Args:
    tree: the history.
    blocks: candidates, that may hold the newest tokens' counterparts.
    newest: [n] the newest token ids.
    weights: [n], see `span_weights`.
    stop: token from which on nothing is read.

  Returns:
    {block: share of the weight that agrees, in [0, 1]} of the blocks that hold
    the next 32 tokens after the best place in every candidate.
  """
  out: dict[int, float] = {}
  for block in blocks:
    first = block * BRANCHING
    low = max(0, first + 1 - len(newest))
    ids = tree.tokens(low, min(stop, first + BRANCHING))
    shares = agreements(ids, newest, weights)
    if not len(shares):
      continue
    at = int(np.argmax(shares))
    end = low + at + len(newest)  # the token that comes next there
    for near in range(end // BRANCHING, (end + BRANCHING - 1) // BRANCHING + 1):
      if (near + 1) * BRANCHING <= stop:
        out[near] = max(out.get(near, 0.0), float(shares[at]))
  return out
