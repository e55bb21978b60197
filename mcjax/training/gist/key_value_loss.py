"""The loss of gists that are keys and values, and what they recover.

The teacher reads a window in full; its own keys and values are what the writer
pools (`gist/key_value.py`). The student reads every segment behind the gists
of all blocks before it, as `losses.py` has it for gists that are vectors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import model
from mcjax.gist import encoder as gistnet
from mcjax.gist import key_value
from mcjax.gist import weights as gist_weights
from mcjax.parallel import sharding
from mcjax.training.gist import attention_match, losses, recovery
from mcjax.types import BRANCHING, McjaxError

_QUERIES, _FIRST = 8, 64  # texts for mean queries, and the tokens left out


def started(lm, gist_config: gistnet.GistNetConfig, params, stores,
            seed: int = 0):
  """Parameters whose writer, if it is untrained, starts at mean queries.

  Args:
    lm: the base; others than plain Llamas keep the start that they have.
    gist_config: of the run.
    params: of the run's start; None makes fresh ones.
    stores: training text by kind.
    seed: of the excerpts.
  """
  if params is None:
    params = gist_weights.init_params(gist_config, seed)
  writer = params["adapter"]["key_value"]
  if np.any(np.asarray(writer["pick"])) or not attention_match.covers(
      lm.config):
    return params
  length = 512
  texts = recovery.pick_excerpts(stores, length, _QUERIES, seed).ids[:_QUERIES]
  pick = np.mean([np.asarray(_mean_queries(
    lm.params, lm.config, jnp.asarray(ids, jnp.int32))) for ids in texts],
    axis=0)
  fresh = key_value.init(lm.config.n_layers, gist_config.base_shape, pick)
  return {**params, "adapter": {**params["adapter"], "key_value": fresh}}


@functools.partial(jax.jit, static_argnames="config")
def _mean_queries(params, config: model.DecoderConfig, ids):
  """Mean un-rotated queries [L, K, H] of a text, over the heads of a group."""
  _, rows = attention_match.trace(
    params, config, model.embed(params, ids, jnp.float32))
  q = rows.queries[:, _FIRST:]
  shape = q.shape[:2] + (config.n_kv_heads, -1, q.shape[-1])
  return jnp.mean(q.reshape(shape), axis=(1, 3))


def _behind(base_params, base_config, gists: key_value.Written, x, places,
            visible, remat: str = "none"):
  """Final hidden states of x [T, D] behind gists."""
  far = model.Segment(
    gists.keys.astype(x.dtype), gists.values.astype(x.dtype),
    jnp.arange(gists.keys.shape[2], dtype=jnp.int32), visible,
    bias=gists.bias)
  return model.forward(
    base_params, base_config, x, places, (far,), remat=remat)[0]


def window_loss(gist_params, gist_config: gistnet.GistNetConfig, base_params,
                base_config: model.DecoderConfig, o: losses.Objective,
                ids: jax.Array, key: jax.Array):
  """Loss of one window of ids [window]; as `losses.window_loss`.

  Returns:
    loss [] and [] float32 metrics `kl_key_value`, `nll_key_value`,
    `teacher_nll` and `loss`.
  """
  del key, gist_config
  ids = ids.astype(jnp.int32)
  x = losses.embed(base_params, o, ids)
  teacher, keys, values = jax.lax.stop_gradient(model.forward(
    base_params, base_config, x, jnp.arange(o.window, dtype=jnp.int32),
    remat=o.remat))
  gists = key_value.write(
    gist_params["adapter"]["key_value"], keys, values)
  gone = (np.asarray(o.starts) - o.near) // BRANCHING
  own = np.arange(o.near + o.segment, dtype=np.int32)
  places = jnp.asarray(gone[:, None] + own[None], jnp.int32)
  visible = jnp.asarray(
    np.arange(gists.keys.shape[2])[None] < gone[:, None])
  index = jnp.asarray(o.index, jnp.int32)
  student = jax.vmap(functools.partial(
    _behind, base_params, base_config, gists, remat=o.remat)
  )(x[index], places, visible)[:, o.near :]
  index = index[:, o.near :].reshape(-1)
  known = (index + 1 < o.window).astype(jnp.float32)
  loss, sums = losses.distribution_loss(
    student.reshape(-1, student.shape[-1]), base_params, teacher[index],
    ids[jnp.minimum(index + 1, o.window - 1)], known / jnp.sum(known),
    o.kl, o.nll, o.chunk)
  return loss, {"kl_key_value": sums[0], "nll_key_value": sums[1],
                "teacher_nll": sums[2], "loss": loss}


@functools.partial(jax.jit, static_argnames=("config", "setting"))
def _scored(params, config, maps, ids, setting: recovery.Setting):
  """Losses [n, horizon] of excerpts [n, length] behind gists of this kind."""

  def one(ids):
    x = model.embed(params, ids, jnp.float32)
    _, keys, values = model.forward(
      params, config, x[: setting.far],
      jnp.arange(setting.far, dtype=jnp.int32))
    gists = key_value.write(maps, keys, values)
    rest = x[setting.far : -1]
    places = setting.blocks + jnp.arange(len(rest), dtype=jnp.int32)
    hidden = _behind(params, config, gists, rest, places,
                     jnp.ones(setting.blocks, bool))
    return model.token_nll(
      params, hidden[-setting.horizon :], ids[-setting.horizon :])

  return jax.lax.map(one, ids)


def score(params, config: model.DecoderConfig, maps,
          excerpts: recovery.Excerpts, setting: recovery.Setting
          ) -> np.ndarray:
  """Losses [n, horizon] in nats behind gists that are keys and values.

  Args:
    params, config: of the base.
    maps: the writer.
    excerpts, setting: as for `recovery.Bench`, at level 1 without a sink.

  Raises:
    McjaxError: another setting.
  """
  if setting.sink or setting.level != 1:
    raise McjaxError("gists of keys and values are scored at level 1 without "
                     "a sink")
  found = _scored(params, config, maps, np.asarray(excerpts.ids, np.int32),
                  setting)
  return sharding.fetch(found).astype(np.float64)
