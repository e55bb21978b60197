"""Which sentences answer: a small network over `sentence_features`.

It sees the sentences that touch the blocks LensNet wishes for, and says how
likely each is the one that tells the answer. Its parameters are the part "read"
of LensNet's weights; it depends neither on the base nor on its tokenizer.
"""

from __future__ import annotations

from typing import Any, cast

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mcjax.lens.sentence_features import FEATURES, MOST
from mcjax.types import Array, McjaxError

PART = "read"  # of LensNet's parameters
HIDDEN = 4
_MOST_DEVIATIONS = 5.0  # that a feature counts at most


class SentenceNet(nn.Module):
  """Logits [S] of sentences among each other, from features [S, FEATURES]."""

  hidden: int = HIDDEN

  @nn.compact
  def __call__(self, features: Array) -> jax.Array:
    mean = self.param("mean", nn.initializers.zeros, (FEATURES,))
    scale = self.param("scale", nn.initializers.ones, (FEATURES,))
    mean, scale = jax.lax.stop_gradient((mean, scale))
    x = jnp.clip((features - mean[None]) * scale[None], -_MOST_DEVIATIONS,
                 _MOST_DEVIATIONS)
    h = nn.gelu(nn.Dense(self.hidden, name="into")(x))
    h = h + nn.gelu(nn.Dense(self.hidden, name="mid")(h))
    return (nn.Dense(1, use_bias=False, name="out")(h)
            + nn.Dense(1, use_bias=False, name="linear")(x))[:, 0]


def init_params(seed: int = 0, hidden: int = HIDDEN) -> dict[str, Any]:
  """Deterministic untrained parameters."""
  return dict(SentenceNet(hidden).init(
    jax.random.key(seed), jnp.zeros((1, FEATURES)))["params"])


def logits(params, features: Array) -> jax.Array:
  """`SentenceNet`'s; the hidden width is that of the parameters."""
  hidden = np.shape(params["into"]["kernel"])[1]
  return cast(jax.Array, SentenceNet(hidden).apply(
    {"params": params}, features))


def likelihood(params, features: np.ndarray) -> np.ndarray:
  """How likely each of S sentences is the one, relative to the best, [S].

  Args:
    params: the part "read" of LensNet's.
    features: [S, FEATURES], S up to `MOST`.
  """
  padded = np.zeros((MOST, FEATURES), np.float32)
  padded[: len(features)] = features
  found = np.asarray(_logits(params, padded))[: len(features)]
  return np.exp(found - found.max())


_logits = jax.jit(logits)


def warm_up(params) -> None:
  """Compiles `likelihood`."""
  likelihood(params, np.zeros((1, FEATURES), np.float32))


def fits(params) -> bool:
  """Whether parameters of LensNet, if they choose sentences, read `FEATURES`.
  """
  if PART not in params:
    return True
  try:
    jax.eval_shape(logits, params[PART], np.zeros((1, FEATURES), np.float32))
  except Exception:  # what Flax raises of other shapes
    return False
  return True


def check(path, params) -> None:
  """Refuses weights of a file that read other features.

  Raises:
    McjaxError: names the file.
  """
  if not fits(params):
    raise McjaxError(
      f"{path}: its choice of sentences does not read {FEATURES} features: "
      "fit it again by experiments.train_reader")
