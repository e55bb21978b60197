"""Attention by a library's kernel instead of the decoder's own products.

`DecoderConfig.attention` names one of KINDS:

  plain   the decoder's own products, on every platform
  xla     jax.nn.dot_product_attention in its XLA form, on every platform
  cudnn   the same by cuDNN: CUDA, bfloat16, heads of at most 128 dimensions

Pallas' splash attention is none of them. Which entries of a window see which is
data here, and its kernel takes a mask that is data only outside of `jax.jit`
(JAX 0.10.2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mcjax.base.decoder_config import DecoderConfig
from mcjax.base.rotation import turn
from mcjax.types import McjaxError

KINDS = ("plain", "xla", "cudnn")
_CUDNN_HEAD = 128
_NONE_OF_THEM = {
  "splash": " (its masks must be known when a program is compiled)"
}


def check(kind: str, config: DecoderConfig, activations: str,
          platform: str) -> None:
  """Refuses an attention that cannot run.

  Args:
    kind: of attention.
    config: of the decoder.
    activations: dtype of the decoder's activations.
    platform: of the devices, as JAX names it.

  Raises:
    McjaxError: unknown, or not on these devices with these sizes.
  """
  if kind not in KINDS:
    raise McjaxError(
      f"attention must be one of {', '.join(KINDS)}, got {kind!r}"
      f"{_NONE_OF_THEM.get(kind, '')}")
  if kind != "cudnn":
    return
  needs = (
    (platform in ("gpu", "cuda"), "a CUDA GPU"),
    (activations == "bfloat16", "activations='bfloat16'"),
    (config.head_dim <= _CUDNN_HEAD,
     f"heads of at most {_CUDNN_HEAD} dimensions"))
  missing = [what for there, what in needs if not there]
  if missing:
    raise McjaxError(
      f"attention {kind!r} needs {' and '.join(missing)}; 'xla' and 'plain' run"
      " everywhere")


def sees(config, kind, q_positions, positions, visible):
  """Whether queries at positions [T] attend to keys at [S]: bool [T, S]."""
  ahead = q_positions[:, None] - positions[None, :]
  allowed = (ahead >= 0) & visible[None, :]
  if kind.local is not None:
    allowed &= (ahead < config.local_window) | ~kind.local
  return allowed


def attend(config, query, segments, tables, q_positions, kind):
  """As `decoder_layer.attend`, over all segments at one time."""
  keys, values, allowed, biases = [], [], [], []
  for (k, v, positions, visible, _, bias), table in zip(
      segments, tables, strict=True):
    biases.append(bias)
    keys.append(k if table is None else turn(k, table, kind))
    values.append(v)
    allowed.append(sees(config, kind, q_positions, positions, visible))
  k, v = (jnp.concatenate(x, axis=1).astype(query.dtype)
          for x in (keys, values))
  mask = jnp.concatenate(allowed, axis=1)
  return jax.nn.dot_product_attention(
    query, k.swapaxes(0, 1), v.swapaxes(0, 1), _bias(config, biases, keys),
    mask=mask[None], implementation=config.attention)


def _bias(config, biases, keys):
  """Biases [1, N, 1, S] of all keys, for every query head; None if none."""
  if all(bias is None for bias in biases):
    return None
  parts = [jnp.zeros(k.shape[:2], k.dtype) if bias is None else bias
           for bias, k in zip(biases, keys)]
  joined = jnp.concatenate(parts, axis=1)
  return jnp.repeat(
    joined, config.n_heads // config.n_kv_heads, axis=0)[None, :, None]
