"""What reads gists: the part of a GistNet's parameters that writes none.

The base reads gists through it: a gain and a shift of every channel of a
layer's input, a low-rank map of it, LoRA of the attention (`lora.py`). Besides
it holds what writes a gist as keys and values (`key_value.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.gist import key_value
from mcjax.gist import lora as low_rank
from mcjax.gist.network import GistNetConfig

_APART = {"lora_all", "key_value"}  # no part of the adapter's layers


def init(config: GistNetConfig, seed) -> dict:
  """An adapter that changes nothing yet; writers of keys and values besides."""
  layers, d, rank = config.adapter_layers, config.d_model, config.adapter_rank
  zeros = jnp.zeros((layers, d), jnp.float32)
  adapter: dict[str, Any] = {"gain": zeros, "shift": zeros}
  if rank:
    key = jax.random.fold_in(jax.random.key(seed), 1)
    adapter["down"] = jax.random.normal(
      key, (layers, d, rank), jnp.float32) / np.float32(np.sqrt(d))
    adapter["up"] = jnp.zeros((layers, rank, d), jnp.float32)
  if config.lora_rank:
    key = jax.random.fold_in(jax.random.key(seed), 2)
    adapter[low_rank.SCOPES[config.lora_scope]] = low_rank.init(
      layers, d, config.base_shape, config.lora_rank, key)
  if config.key_value:
    adapter["key_value"] = key_value.init(layers, config.base_shape)
  return adapter


def without_adapter(params) -> dict:
  """The parameters of the network alone, which writes the gists."""
  return {name: stage for name, stage in params.items() if name != "adapter"}


def stored(adapter: dict) -> dict:
  """An adapter as a file holds it: its map as float16 where that holds it."""
  def small(value) -> np.ndarray:
    value = np.asarray(value)
    fits = np.abs(value).max(initial=0.0) <= np.finfo(np.float16).max
    return value.astype(np.float16) if fits else value

  return {name: small(value) if name in ("down", "up") else value
          for name, value in adapter.items()}


def with_adapter(base_params, params) -> dict:
  """A base's parameters, with which it reads the gists of this GistNet.

  Args:
    base_params: see `model.py`.
    params: of a GistNet; without an adapter the base's come back as they are.
  """
  if "adapter" not in params:
    return base_params
  adapter, layers = params["adapter"], base_params["layers"]
  if "lora_all" in adapter:
    layers = low_rank.merged(layers, adapter["lora_all"])
  if not _APART.isdisjoint(adapter):
    adapter = {k: a for k, a in adapter.items() if k not in _APART}
  return {**base_params, "layers": layers, "gist_adapter": adapter}
