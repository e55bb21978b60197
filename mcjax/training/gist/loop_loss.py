"""The loss of a window as the loop has it: far gists, some of them expanded.

The student sees the sink, gists of gists, gists of blocks, a few of these
blocks raw instead, `near` newest tokens and the segment that is scored. The
teacher is the frozen decoder over all of the raw text. Far text helps few
tokens, so a token weighs what the teacher gains from it: its loss where the
gists are hidden less its loss with the raw text, and `floor` besides. Windows
in which the far text helps more thus weigh more.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import model
from mcjax.gist import adapters
from mcjax.gist import encoder as gistnet
from mcjax.training.gist import losses
from mcjax.types import BRANCHING

_MOST = 4.0  # nats that a token's gain counts at most
_BLOCK2 = BRANCHING**2


class Window(NamedTuple):
  """What the student sees; causality is by position, not by order.

  Attributes:
    x: [T, D] embeddings: sink, L2 gists, L1 gists, expanded blocks, raw end.
    places: [T] int32 positions.
    gists: [T] bool, which of x are gists.
    visible: [T] bool; the gists of expanded blocks are not.
  """

  x: jax.Array
  places: jax.Array
  gists: jax.Array
  visible: jax.Array


def cut(o: losses.Objective, ids: jax.Array) -> tuple[jax.Array, ...]:
  """Token ids of the sink, of L2 stretches, of L1 blocks, and the raw end.

  [32], [upper, 1024], [lower, 32] and [near + segment].
  """
  first = BRANCHING + o.upper * _BLOCK2
  last = o.window - o.near - o.segment
  return (ids[:BRANCHING], ids[BRANCHING:first].reshape(-1, _BLOCK2),
          ids[first:last].reshape(-1, BRANCHING), ids[last:])


def written(gist_params, gist_config, base_params, base_config, stretches,
            blocks) -> tuple[jax.Array, jax.Array]:
  """L2 gists [upper, D] and L1 gists [lower, D] of token ids."""
  every = jnp.concatenate([stretches.reshape(-1, BRANCHING), blocks])
  features = gistnet.token_features(
    base_params, base_config, every, gist_config.input_layer)
  gists = gistnet.apply(gist_params, gist_config, features, 1)[:, 0]
  far = stretches.shape[0] * BRANCHING
  upper = gists[:0]
  if far:
    children = gists[:far].reshape(-1, BRANCHING, gists.shape[-1])
    upper = gistnet.apply(gist_params, gist_config, children, 2)[:, 0]
  return upper, gists[far:]


def arrange(base_params, o: losses.Objective, ids: jax.Array,
            upper: jax.Array, lower: jax.Array, key: jax.Array) -> Window:
  """The window of gists; `o.expanded` random blocks of them are raw.

  Args:
    base_params: of the base.
    o: the objective.
    ids: [window] token ids.
    upper: [upper, D] L2 gists.
    lower: [lower, D] L1 gists.
    key: of the choice.
  """
  sink, _, blocks, end = cut(o, ids)
  chosen = jnp.sort(jax.random.choice(
    key, blocks.shape[0], (o.expanded,), replace=False))
  opened = jnp.zeros(blocks.shape[0], bool).at[chosen].set(True)
  steps = jnp.where(opened, BRANCHING, o.gist_stride)
  lead = BRANCHING + upper.shape[0] * o.gist_stride
  starts = lead + jnp.cumsum(steps) - steps
  inside = jnp.arange(BRANCHING)
  middle = o.gist_stride // 2
  places = jnp.concatenate([
    jnp.arange(BRANCHING),
    BRANCHING + jnp.arange(upper.shape[0]) * o.gist_stride + middle,
    starts + middle,
    (starts[chosen][:, None] + inside[None]).reshape(-1),
    lead + jnp.sum(steps) + jnp.arange(end.shape[0])])
  raw = losses.embed(
    base_params, o, jnp.concatenate([sink, blocks[chosen].reshape(-1), end]))
  x = jnp.concatenate([
    raw[:BRANCHING], upper.astype(raw.dtype), lower.astype(raw.dtype),
    raw[BRANCHING:]])
  count = upper.shape[0] + lower.shape[0]
  is_gist = np.zeros(x.shape[0], bool)
  is_gist[BRANCHING : BRANCHING + count] = True
  visible = jnp.ones(x.shape[0], bool).at[
    BRANCHING + upper.shape[0] : BRANCHING + count].set(~opened)
  return Window(x, places.astype(jnp.int32), jnp.asarray(is_gist), visible)


def window_loss(gist_params, gist_config: gistnet.GistNetConfig, base_params,
                base_config: model.DecoderConfig, o: losses.Objective,
                ids: jax.Array, key: jax.Array):
  """Loss of one window of ids [window]; as `losses.window_loss`.

  Returns:
    loss [] and [] float32 metrics: `kl_loop`, weighted; the plain means
    `nll_loop` with gists seen, `nll_loop_hidden` with them hidden and
    `teacher_nll_loop`, in nats a token.
  """
  ids = ids.astype(jnp.int32)
  _, stretches, blocks, _ = cut(o, ids)
  upper, lower = written(
    gist_params, gist_config, base_params, base_config, stretches, blocks)
  seen = arrange(base_params, o, ids, upper, lower, key)
  reader = adapters.with_adapter(base_params, gist_params)

  def read(params, x, places, **more):
    return model.forward(
      params, base_config, x, places, remat=o.remat, **more
    )[0][-o.segment :]

  student = read(reader, seen.x, seen.places, visible=seen.visible,
                 gists=seen.gists)
  teacher, hidden = jax.lax.stop_gradient((
    read(base_params, losses.embed(base_params, o, ids),
         jnp.arange(o.window, dtype=jnp.int32)),
    read(base_params, seen.x, _without(seen),
         visible=seen.visible & ~seen.gists)))
  nll = {}
  for name, params, states in (
      ("nll_loop", reader, jax.lax.stop_gradient(student)),
      ("nll_loop_hidden", base_params, hidden),
      ("teacher_nll_loop", base_params, teacher)):
    nll[name] = model.token_nll(params, states[:-1], ids[1 - o.segment :])
  gain = jnp.clip(
    nll["nll_loop_hidden"] - nll["teacher_nll_loop"], 0.0, _MOST)
  weights = jnp.append(gain + np.float32(o.floor), 0.0) / (o.segment - 1)
  loss, sums = losses.distribution_loss(
    student, base_params, teacher, jnp.append(ids[1 - o.segment :], 0),
    weights, o.kl, o.nll, o.chunk)
  means = {name: jnp.mean(values) for name, values in nll.items()}
  return loss, means | {"kl_loop": sums[0], "loss": loss}


def _without(seen: Window) -> jax.Array:
  """Positions where gists take none."""
  order = jnp.argsort(seen.places, stable=True)
  steps = jnp.where(seen.gists, 0, 1)
  before = jnp.cumsum(steps[order]) - steps[order]
  return jnp.zeros_like(seen.places).at[order].set(
    before.astype(jnp.int32))
