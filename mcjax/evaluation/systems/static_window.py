"""A window that stands still: what a slot is worth, raw or as a gist.

The window ends right before the tokens that are scored: a sink, then gists of
what lies just before, then the newest raw tokens. Nothing decides on focus
here, so that windows of the same number of slots differ in one thing only.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax.base import model
from mcjax.base.load import BaseLM
from mcjax.gist.encoder import GistEncoder
from mcjax.training.gist import losses
from mcjax.types import BRANCHING

SINK = 32  # tokens


class Parts(NamedTuple):
  """A text cut for a window.

  Attributes:
    sink: [SINK] first tokens.
    far: [32 * gists] tokens that the gists stand for.
    near: the newest tokens of the window.
    ahead: what is scored.
  """

  sink: np.ndarray
  far: np.ndarray
  near: np.ndarray
  ahead: np.ndarray


def needed(window: int, gists: int) -> int:
  """Tokens before the scored ones that `cut` takes."""
  return window + gists * (BRANCHING - 1)


def cut(ids: np.ndarray, window: int, gists: int, scored: int) -> Parts:
  """Cuts a text whose last `scored` tokens are scored.

  Args:
    ids: at least `needed(window, gists)` + scored.
    window: slots, the sink's and the gists' included.
    gists: how many.
    scored: tokens.
  """
  end = len(ids) - scored
  near = end - (window - SINK - gists)
  return Parts(ids[:SINK], ids[near - BRANCHING * gists : near], ids[near:end],
               ids[end:])


def nll(lm: BaseLM, parts: Parts, gists: np.ndarray | None = None
        ) -> np.ndarray:
  """NLL [n] in nats of what is ahead, behind sink, gists and near tokens.

  Args:
    lm: the base, as it reads gists.
    parts: of the text.
    gists: [G, D]; None leaves them out.
  """
  width = lm.config.d_model
  middle = np.zeros((0, width), np.float32) if gists is None else gists
  raw = np.concatenate([parts.near, parts.ahead]).astype(np.int32)
  return np.asarray(_nll(
    lm.params, lm.config, parts.sink.astype(np.int32), jnp.asarray(middle),
    raw, len(parts.ahead)))


def forwarded(window: int, gists: int, scored: int, steps: int = 0) -> int:
  """Tokens and gists that the base runs on for one text at a window.

  Args:
    window: slots.
    gists: of them.
    scored: tokens.
    steps: of `fitted`, which reads the text raw once before them; a step runs
      forward and back, and back counts as once.
  """
  count = window + scored
  if steps:
    count += needed(window, gists) + 2 * steps * window
  return count


def written(encoder: GistEncoder, parts: Parts) -> np.ndarray:
  """The GistNet's gists [G, D] float32 of the far tokens."""
  return encoder.encode_tokens(parts.far.reshape(-1, BRANCHING))


def fitted(lm: BaseLM, reader: BaseLM, parts: Parts, gists: np.ndarray,
           steps: int, rate: float) -> np.ndarray:
  """Gists [G, D] fitted so that the near tokens are read as after the far ones.

  Adam on the KL to the base's own distributions behind the raw far tokens.
  What is ahead takes no part.

  Args:
    lm: the base, the teacher.
    reader: the base as it reads gists.
    parts: of the text.
    gists: [G, D] to start from.
    steps: of Adam.
    rate: of Adam.
  """
  near = jnp.asarray(parts.near, jnp.int32)
  teacher = _teacher(lm.params, lm.config, jnp.asarray(np.concatenate(
    [parts.sink, parts.far, parts.near]), jnp.int32), len(parts.near))
  found = jnp.asarray(gists, jnp.float32)
  moments = optax.adam(rate).init(found)
  for _ in range(steps):
    found, moments = _step(
      reader.params, lm.config, jnp.asarray(parts.sink, jnp.int32), found,
      moments, near, teacher, rate)
  return np.asarray(found)


def _hidden(params, config, sink, gists, raw, remat: str = "none"):
  """Hidden states [T, D] of sink, gists [G, D] and raw tokens."""
  x = jnp.concatenate([
    model.embed(params, sink, jnp.float32), gists,
    model.embed(params, raw, jnp.float32)])
  is_gist = np.zeros(x.shape[0], bool)
  is_gist[len(sink) : len(sink) + len(gists)] = True
  places = jnp.arange(x.shape[0], dtype=jnp.int32)
  return model.forward(params, config, x, places, remat=remat,
                       gists=jnp.asarray(is_gist))[0]


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _nll(params, config, sink, gists, raw, count: int):
  hidden = _hidden(params, config, sink, gists, raw)
  return model.token_nll(params, hidden[-count - 1 : -1], raw[-count:])


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _teacher(params, config, ids, count: int):
  places = jnp.arange(ids.shape[0], dtype=jnp.int32)
  x = model.embed(params, ids, jnp.float32)
  return model.forward(params, config, x, places)[0][-count:]


@functools.partial(jax.jit, static_argnames=("config", "rate"))
def _step(params, config, sink, gists, moments, near, teacher, rate: float):
  def divergence(gists):
    student = _hidden(params, config, sink, gists, near, remat="layer")
    count = near.shape[0]
    return losses.distribution_loss(
      student[-count:], params, teacher, near,
      jnp.full((count,), 1 / count, jnp.float32), 1.0, 0.0, 256)[0]

  slope = jax.grad(divergence)(gists)
  with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
    change, moments = optax.adam(rate).update(slope, moments)
  return optax.apply_updates(gists, change), moments
