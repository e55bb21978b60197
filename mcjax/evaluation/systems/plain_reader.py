"""The base by itself: answers behind a text, and the losses of one.

Full causal attention over what it is given, in chunks of fixed shapes.
"""

from __future__ import annotations

import jax
import numpy as np

from mcjax.base import model
from mcjax.base.load import BaseLM
from mcjax.evaluation.systems import baselines
from mcjax.types import McjaxError

_BLOCK = 32  # tokens decoded in one device loop


class PlainReader:
  """A base behind at most as many tokens as it has positions.

  Args:
    lm: the base.

  Attributes:
    forwarded: tokens that the base ran on so far.
  """

  def __init__(self, lm: BaseLM):
    self.lm = lm
    self.forwarded = 0
    self._layers = model.unstacked(lm.params)

  @property
  def limit(self) -> int:
    """Tokens that fit the base's positions."""
    return self.lm.config.max_positions

  def generate(self, ids: np.ndarray, limit: int) -> np.ndarray:
    """Greedy tokens behind ids [n], at most `limit`, a stop token included.

    Raises:
      McjaxError: prompt and answer do not fit the base's positions.
    """
    blocks = -(-limit // _BLOCK)
    cache, logits = baselines.prefill(
      self.lm, ids, self._cache(len(ids) + blocks * _BLOCK))
    self.forwarded += len(ids)
    out: list[int] = []
    stops = set(self.lm.tokenizer.stop_ids)
    while len(out) < limit and not stops & set(out[-_BLOCK:]):
      cache, tokens, logits = baselines.decode_block(
        self._layers, self.lm.config, cache, np.int32(len(ids) + len(out)),
        logits, _BLOCK)
      out += np.asarray(tokens).tolist()
    end = next((i + 1 for i, t in enumerate(out) if t in stops), len(out))
    out = out[: min(end, limit)]
    self.forwarded += len(out)
    return np.array(out, np.int32)

  def nll(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """NLL [n] in nats of ids [n] behind `before`; NaN where nothing is.

    Raises:
      McjaxError: they do not fit the base's positions.
    """
    both = np.concatenate([before, ids]).astype(np.int32)
    chunk = baselines.CHUNK
    cache = self._cache(len(both))
    padded = np.zeros(-(-len(both) // chunk) * chunk, np.int32)
    padded[: len(both)] = both
    out = []
    for a in range(0, len(padded), chunk):
      cache, hidden = baselines.prefill_chunk(
        self.lm, cache, padded[a : a + chunk], a)
      if a + chunk >= len(before):
        targets = np.zeros(chunk, np.int32)
        follows = padded[a + 1 : a + 1 + chunk]
        targets[: len(follows)] = follows
        out.append((a, np.asarray(_losses(self.lm.params, hidden, targets))))
    self.forwarded += len(both)
    losses = np.full(len(padded) + 1, np.nan, np.float32)
    for a, found in out:
      losses[a + 1 : a + 1 + chunk] = found
    return losses[len(before) : len(both)]

  def _cache(self, size: int) -> baselines.Cache:
    if size > self.limit:
      raise McjaxError(
        f"{size} tokens do not fit the {self.lm.name} base's {self.limit} "
        "positions")
    whole = -(-size // 1024) * 1024  # few shapes
    return baselines.empty_cache(
      self.lm.config, whole, self.lm.params["embed"].dtype)


@jax.jit
def _losses(params, hidden, targets):
  return model.token_nll(params, hidden, targets)

