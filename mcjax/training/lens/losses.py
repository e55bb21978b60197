"""What LensNet is taught: which blocks answer, what is worth its slots.

A prompt's blocks are ranked (a softmax over the window must put its weight on
blocks that answer, and on all of them) and weighed (each alone must say whether
it answers, where a miss costs more than a wasted slot). While text is read on,
blocks are weighed by what they saved or cost: one is wished for where that is
expected to save more than it costs. One more output says whether the history
answers at all.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.lens import network as lensnet
from mcjax.lens.features import LensInputs
from mcjax.types import Array, McjaxError


@dataclasses.dataclass(frozen=True)
class LensObjective:
  """Weights of the terms.

  Attributes:
    rank: any block that answers leads.
    complete: all blocks that answer do.
    weigh: each block says whether it answers.
    miss: what a missed block costs, a wasted slot costing 1.
    answerable: whether the history answers.
    dropout: share of features hidden from a step.
  """

  rank: float = 1.0
  complete: float = 0.3
  weigh: float = 0.5
  miss: float = 300.0
  answerable: float = 0.3
  dropout: float = 0.05

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not 0 <= getattr(self, field.name) < np.inf:
        raise McjaxError(f"config.objective.{field.name} must be >= 0, got "
                         f"{getattr(self, field.name)}")


class Targets(NamedTuple):
  """Labels of B windows; see `windows.WindowSet`.

  Attributes:
    gold, worth: [B, R] float32; worth is NaN where it is not known.
    asked, answerable: [B] bool.
  """

  gold: Array
  worth: Array
  asked: Array
  answerable: Array


def loss(params, lens: lensnet.LensNetConfig, objective: LensObjective,
         inputs: LensInputs, targets: Targets, key: jax.Array,
         part: str = "score") -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean loss of a batch and its terms; arrays with a leading [B]."""
  keep = jax.random.bernoulli(
    key, 1 - objective.dropout, inputs.features.shape[-1:])
  inputs = inputs._replace(
    features=inputs.features * keep[None, None].astype(jnp.float32))
  out = jax.vmap(lambda x: lensnet.evaluate(params, lens, x, part))(inputs)
  asked = targets.asked[:, None]
  value = jnp.where(asked, targets.gold, 0.0)
  gold = (value > 0) & inputs.mask
  known = jnp.any(gold, axis=1)
  log_share = jax.nn.log_softmax(out.rank, axis=1)
  held = jnp.log(jnp.where(gold, value, 1.0))
  rank = -jax.nn.logsumexp(jnp.where(gold, log_share + held, -1e9), axis=1)
  share = jnp.where(gold, value, 0.0)
  share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1e-6)
  complete = -jnp.sum(share * jnp.where(gold, log_share, 0.0), axis=1)
  saved = jnp.where(jnp.isnan(targets.worth), 0.0, targets.worth)
  gain = jnp.where(asked, objective.miss * value, jnp.maximum(saved, 0.0))
  cost = jnp.where(asked, jnp.where(gold, 0.0, 1.0),
                   jnp.maximum(-saved, 0.0))
  twice = 2 * out.worth  # tanh(w) = 2 sigmoid(2 w) - 1
  weigh = gain * jax.nn.softplus(-twice) + cost * jax.nn.softplus(twice)
  rows = jnp.maximum(jnp.sum(inputs.mask.astype(jnp.float32), 1), 1.0)
  weigh = 4 * jnp.sum(jnp.where(inputs.mask, weigh, 0.0), 1) / rows
  logit = out.answerable
  answers = jax.nn.softplus(jnp.where(targets.answerable, -logit, logit))
  terms = {
    "rank": _mean(rank, known), "complete": _mean(complete, known),
    "weigh": jnp.mean(weigh),
    "answerable": _mean(answers, targets.asked)}
  total = jnp.asarray(sum(
    getattr(objective, name) * term for name, term in terms.items()))
  return total, terms | {"loss": total}


def _mean(values: jax.Array, some: Array) -> jax.Array:
  count = jnp.maximum(jnp.sum(some.astype(jnp.float32)), 1.0)
  return jnp.sum(jnp.where(some, values, 0.0)) / count


def recall(scores: np.ndarray, gold: np.ndarray, count: int) -> float:
  """Share of windows [N, R] with a gold block among the `count` best."""
  best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
  return float(np.take_along_axis(gold, best, 1).any(axis=1).mean())


def fit_apart(rank: np.ndarray, shadow: np.ndarray, gold: np.ndarray,
              counts=(4, 8, 12, 16, 20), tries: int = 200, seed: int = 0
              ) -> np.ndarray:
  """How much neighbours of better blocks lose, by search: float32 [3].

  Which of several neighbours is taken has no gradient, so the three numbers
  are those, of many tried, with the best mean recall.

  Args:
    rank: [N, R] logits, very low for padding.
    shadow: [N, R, 3] see `network.overshadowed`.
    gold: [N, R] bool.
    counts: numbers of blocks taken.
    tries: numbers tried.
    seed: of the search.
  """
  rng = np.random.default_rng(seed)
  best, top = np.zeros(shadow.shape[-1], np.float32), -1.0
  for i in range(tries):
    found = best + rng.normal(0, 0.4, best.shape)
    if i < tries // 3:
      found = rng.uniform(0, 3, best.shape) * (rng.random(best.shape) < 0.7)
    found = np.maximum(found, 0).astype(np.float32) if i else best
    value = np.mean([recall(rank - shadow @ found, gold, c) for c in counts])
    if value > top:
      best, top = found, value
  return best
