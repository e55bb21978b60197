"""GistNet's parameters: fresh, configured for a base, read and written."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from mcjax import pretrained
from mcjax.base import model
from mcjax.base.load import BaseLM
from mcjax.gist import adapters
from mcjax.gist import lora as low_rank
from mcjax.gist.network import GistNet, GistNetConfig
from mcjax.parallel import sharding
from mcjax.settings import check_names
from mcjax.types import BRANCHING, McjaxError

# Fields of the configuration that have no part in writing a gist's vector.
_READING = ("adapter_", "lora_", "key_value", "base_shape")
_SAMPLE = 4096  # embeddings whose size is measured


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: GistNetConfig, seed: int = 0):
  """Fresh parameters; a leading [levels] axis on the network's if `per_level`.

  "adapter" is there if the configuration has layers for it, and changes
  nothing yet.
  """
  params = GistNet(config).init(
    jax.random.key(seed),
    jnp.zeros((1, BRANCHING, config.d_model), jnp.float32), jnp.int32(1),
  )["params"]
  if config.per_level:
    params = jax.tree.map(lambda a: jnp.stack([a] * config.levels), params)
  if config.adapter_layers:
    params = {**params, "adapter": adapters.init(config, seed)}
  return params


def _continued(params, config: GistNetConfig, seed: int) -> dict:
  """Trained parameters, completed by fresh ones for what they lack."""
  fresh = init_params(config, seed)
  whole = dict(fresh)
  for name, stage in params.items():
    if isinstance(stage, Mapping) and name in fresh:
      stage = {**fresh[name], **stage}
    shapes = [jax.tree.map(lambda a: a.shape, s)
              for s in (stage, fresh.get(name))]
    if shapes[0] != shapes[1]:
      raise McjaxError(f"the trained GistNet's {name} does not fit the "
                       "configuration")
    whole[name] = stage
  return whole


@jax.jit
def _rms(embed: jax.Array) -> jax.Array:
  sample = embed[:_SAMPLE].astype(jnp.float32)
  return jnp.sqrt(jnp.mean(jnp.square(sample)))


def _input_rms(embed: jax.Array) -> float:
  """Root mean square of the first embeddings, the same on every mesh.

  A sum over shards rounds otherwise than one over a whole array does.
  """
  if isinstance(embed, jax.Array) and len(embed.sharding.device_set) > 1:
    embed = jnp.asarray(sharding.fetch(_first_rows(embed)))
  return float(_rms(embed))


@jax.jit
def _first_rows(embed: jax.Array) -> jax.Array:
  return embed[:_SAMPLE]


def default_config(base_params, base_config: model.DecoderConfig,
                   **overrides) -> GistNetConfig:
  """The default sizes for a base, in the unit of its embeddings.

  With an `input_rms` among `overrides` the parameters are not looked at.
  """
  d = base_config.d_model
  heads = max(1, round(d / 96))
  sizes: dict[str, Any] = dict(
    d_model=d, heads=heads, width=32 * heads, mlp_width=36 * heads,
    slot_mlp_width=64 * heads, adapter_layers=base_config.n_layers)
  if overrides.get("lora_rank") or overrides.get("key_value"):
    sizes["base_shape"] = low_rank.shape_of(base_config)
  if "input_rms" not in overrides:
    sizes["input_rms"] = _input_rms(base_params["embed"])
  return GistNetConfig(**(sizes | overrides))


def configure(base_params, base_config: model.DecoderConfig,
              values: Mapping[str, Any]) -> GistNetConfig:
  """`default_config` with plain values of a configuration file.

  Args:
    base_params, base_config: of the base.
    values: fields of `GistNetConfig`; None leaves one as it would be.

  Raises:
    McjaxError: names an unknown field or an invalid value.
  """
  return default_config(base_params, base_config, **_given(values))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
  """What is set of plain values, checked."""
  check_names("config.gistnet", values,
              [field.name for field in dataclasses.fields(GistNetConfig)])
  return {k: v for k, v in values.items() if v is not None}


def fingerprint(params, config: GistNetConfig) -> str:
  """Identifies what wrote a gist: the network's weights and configuration.

  The adapter reads gists, so it has no part in it.
  """
  fields = {name: value for name, value in dataclasses.asdict(config).items()
            if not name.startswith(_READING)}
  if not config.context_blocks:  # as it was before there was such a field
    del fields["context_blocks"]
  return pretrained.fingerprint(adapters.without_adapter(params), fields)


def save_gistnet(path, params, config: GistNetConfig, card: dict) -> None:
  """Writes weights, configuration and the facts of `card` as safetensors.

  The adapter's low-rank map, a quarter of the file, is stored as float16.
  """
  adapter = adapters.stored(params.get("adapter", {}))
  pretrained.save_weights(
    path, "gistnet", {**params, "adapter": adapter} if adapter else params,
    dataclasses.asdict(config), card)


def read_gistnet(path) -> tuple[dict, GistNetConfig, dict]:
  """Reads (params, config, card) that `save_gistnet` wrote.

  Raises:
    McjaxError: no such file, not a GistNet, of another version, or weights
      that do not fit the stored configuration.
  """
  params, fields, card = pretrained.read_weights(path, "gistnet")
  config = pretrained.laid_out(
    path, params, init_params, GistNetConfig, fields)
  return params, config, card


def start(lm: BaseLM, values: Mapping[str, Any], path: str = "", seed: int = 0
          ) -> tuple[dict | None, GistNetConfig, dict]:
  """What a training run starts from: a fresh GistNet, or a trained one.

  Args:
    lm: the base.
    values: plain values of a configuration file; what is to differ from the
      default or the trained configuration, None where nothing is. What the
      trained one lacks of this, as an adapter or its low-rank map, starts
      fresh.
    path: of a gistnet.safetensors to be trained on; none if empty.
    seed: of what starts fresh.

  Returns:
    parameters (None: all are fresh), configuration, and what the card of the
    result takes over: the old one as "initial_run", and whether the LM does
    better with the gists in view.

  Raises:
    McjaxError: as `read_gistnet`; an unknown setting, or one that the trained
      weights do not fit.
  """
  if not path:
    return None, configure(lm.params, lm.config, values), {}
  params, config, card = read_gistnet(path)
  given = _given(values)
  if given.get("lora_rank") or given.get("key_value"):
    given["base_shape"] = low_rank.shape_of(lm.config)
  config = dataclasses.replace(config, **given)
  kept = {k: card[k] for k in ("gist_attention", "gists_seen") if k in card}
  return _continued(params, config, seed), config, {
    **kept, "initial_run": card}


def shipped_for(lm: BaseLM) -> pathlib.Path | None:
  """The weights shipped for a base of this name and width, if any."""
  path = pretrained.shipped(lm.name, "gistnet")
  if path is None or read_gistnet(path)[1].d_model != lm.config.d_model:
    return None
  return path
