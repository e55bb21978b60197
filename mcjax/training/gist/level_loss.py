"""The loss of level 2: one gist of gists against its own 32 gists.

A window is 1,024 tokens and a segment after them. The teacher is the frozen
decoder with the stretch's 32 L1 gists in view, the student sees the one L2
gist; both score the segment. The teacher is cheap, since no long text is
decoded, and what it misses of the text the plain next-token loss can teach.
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


def _after(base_params, base_config, o: losses.Objective, gists, tokens):
  """Final hidden states [segment, D] of `tokens` read after gists [n, D]."""
  far, start = losses.gist_segment(
    base_params, base_config, gists.astype(o.activations), o.gist_stride,
    o.remat)
  places = start + jnp.arange(o.segment, dtype=jnp.int32)
  return model.forward(
    base_params, base_config, losses.embed(base_params, o, tokens),
    places, (far,), remat=o.remat)[0]


def window_loss(gist_params, gist_config: gistnet.GistNetConfig, base_params,
                base_config: model.DecoderConfig, o: losses.Objective,
                ids: jax.Array, key: jax.Array):
  """Loss of one window of ids [1024 + segment]; as `losses.window_loss`.

  Returns:
    loss [] and [] float32 metrics whose names end in `_l2`, besides `loss`.
  """
  del key
  ids = ids.astype(jnp.int32)
  stretch, tokens = ids[: BRANCHING**2], ids[BRANCHING**2 :]
  features = gistnet.token_features(
    base_params, base_config, stretch.reshape(-1, BRANCHING),
    gist_config.input_layer)
  children = gistnet.apply(gist_params, gist_config, features, 1)
  parents = gistnet.apply(
    gist_params, gist_config, children.transpose(1, 0, 2), 2)
  flat = parents.reshape(-1, parents.shape[-1])
  reader = adapters.with_adapter(base_params, gist_params)
  teacher = jax.lax.stop_gradient(_after(
    reader, base_config, o,
    children.reshape(-1, children.shape[-1]), tokens))
  student = _after(reader, base_config, o, flat, tokens)
  weights = 1.0 + o.early * 2.0 ** (-np.arange(o.segment) / 8)
  weights[-1] = 0.0  # its next token is not in the window
  loss, sums = losses.distribution_loss(
    student, base_params, teacher, jnp.roll(tokens, -1),
    jnp.asarray(weights / weights.sum(), jnp.float32), o.kl, o.nll, o.chunk)
  size, unit = (jnp.mean(jnp.linalg.norm(a.astype(jnp.float32), axis=-1))
                for a in (flat, features))
  return loss, {"kl_l2": sums[0], "nll_l2": sums[1], "teacher_nll_l2": sums[2],
                "norm_l2": size / unit, "loss": loss}
