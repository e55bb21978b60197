"""The loss of gists that do not belong to the text: they should change nothing.

The far part of every window is exchanged for that of another window. The
student sees its gists, `near` raw tokens and a segment; the teacher is the
frozen decoder without the gists. In a long history most of what stands far back
has nothing to do with what is said now.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import model
from mcjax.gist import adapters
from mcjax.gist import encoder as gistnet
from mcjax.training.gist import losses
from mcjax.types import BRANCHING


def exchange(ids: jax.Array, o: losses.Objective) -> jax.Array:
  """Ids [micro-batches, windows, window] with the next window's far part."""
  flat = ids.reshape(-1, ids.shape[-1])
  far = o.window - o.near - o.segment
  mixed = jnp.concatenate(
    [jnp.roll(flat, 1, axis=0)[:, :far], flat[:, far:]], axis=1)
  return mixed.reshape(ids.shape)


def window_loss(gist_params, gist_config: gistnet.GistNetConfig, base_params,
                base_config: model.DecoderConfig, o: losses.Objective,
                ids: jax.Array, key: jax.Array):
  """Loss of one window of ids [window]; as `losses.window_loss`.

  Returns:
    loss [] and [] float32 metrics whose names end in `_foreign`, besides
    `loss`.
  """
  del key
  ids = ids.astype(jnp.int32)
  own = o.near + o.segment
  features = gistnet.token_features(
    base_params, base_config, ids[:-own].reshape(-1, BRANCHING),
    gist_config.input_layer)
  gists = gistnet.apply(gist_params, gist_config, features, 1)
  reader = adapters.with_adapter(base_params, gist_params)
  far, start = losses.gist_segment(
    reader, base_config,
    gists.reshape(-1, gists.shape[-1]).astype(o.activations), o.gist_stride,
    o.remat)
  tokens = ids[-own:]
  x = losses.embed(base_params, o, tokens)
  places = jnp.arange(own, dtype=jnp.int32)
  teacher = jax.lax.stop_gradient(
    model.forward(base_params, base_config, x, places, remat=o.remat)[0])
  student = model.forward(
    base_params, base_config, x, start + places, (far,), remat=o.remat)[0]
  weights = np.ones(o.segment, np.float32)
  weights[-1] = 0.0  # its next token is not in the window
  loss, sums = losses.distribution_loss(
    student[o.near :], base_params, teacher[o.near :],
    jnp.roll(tokens, -1)[o.near :],
    jnp.asarray(weights / weights.sum()), o.kl, o.nll, o.chunk)
  return loss, {"kl_foreign": sums[0], "nll_foreign": sums[1],
                "teacher_nll_foreign": sums[2], "loss": loss}
