"""Rotary positions (RoFormer, arXiv:2104.09864): tables, and turning by them.

Layers may differ: some do not rotate, some read the newest positions only and
turn by tables of their own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mcjax.base.decoder_config import DecoderConfig
from mcjax.types import Array


def rope_tables(
  config: DecoderConfig, positions: Int[Array, " S"]
) -> tuple[Float[jax.Array, "S rotated"], ...]:
  """Cosines and sines [S, R] in float32 for integer positions [S].

  R is half the channels that are rotated. Where local layers turn otherwise,
  their cosines and sines follow.
  """
  angles = positions.astype(jnp.float32)[:, None] * _frequencies(config)[None]
  tables = jnp.cos(angles), jnp.sin(angles)
  if config.rope_magnitude != 1.0:
    tables = tuple(t * config.rope_magnitude for t in tables)
  if config.local_rope_theta is None:
    return tables
  near = _powers(config.local_rope_theta, config.head_dim // 2)
  angles = positions.astype(jnp.float32)[:, None] * near[None]
  return (*tables, jnp.cos(angles), jnp.sin(angles))


def offset_tables(
  config: DecoderConfig, offsets: Int[Array, " S"]
) -> tuple[Float[jax.Array, "S rotated"], ...]:
  """Tables that turn what is rotated on by offsets [S]; 0 changes no bit."""
  tables = rope_tables(config, offsets)
  if config.rope_magnitude == 1.0:
    return tables
  cos, sin = (t / config.rope_magnitude for t in tables[:2])  # it is there
  return jnp.where(offsets[:, None] == 0, 1.0, cos), sin, *tables[2:]


def _powers(theta: float, count: int) -> jax.Array:
  exponents = jnp.arange(count, dtype=jnp.float32) / count
  return jnp.exp(-math.log(theta) * exponents)


def _frequencies(config: DecoderConfig) -> jax.Array:
  """Radians a position, [R]."""
  if config.rope_freqs is not None:
    return jnp.array(config.rope_freqs, jnp.float32)
  freqs = _powers(config.rope_theta, config.head_dim // 2)
  s = config.rope_scaling
  if s is None:
    return freqs
  wavelength = 2 * math.pi / freqs
  low = s.original_max_positions / s.low_freq_factor
  high = s.original_max_positions / s.high_freq_factor
  smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (
    s.high_freq_factor - s.low_freq_factor
  )
  mixed = (1 - smooth) * freqs / s.factor + smooth * freqs
  return jnp.where(
    wavelength > low,
    freqs / s.factor,
    jnp.where(wavelength < high, freqs, mixed),
  )


def rotate(
  x: Float[Array, "... S H"],
  cos: Float[Array, "S rotated"],
  sin: Float[Array, "S rotated"],
) -> Float[jax.Array, "... S H"]:
  """Rotates x [..., S, H] by tables [S, R]; half-split convention.

  The first 2 R channels of a head are rotated, the others stay.
  """
  lead = (1,) * (x.ndim - 2)
  cos = cos.reshape(lead + cos.shape)
  sin = sin.reshape(lead + sin.shape)
  turned = 2 * cos.shape[-1]
  wide = x.astype(jnp.float32)
  a, b = jnp.split(wide[..., :turned], 2, axis=-1)
  parts: list[Array] = [a * cos - b * sin, b * cos + a * sin]
  if turned < x.shape[-1]:
    parts.append(wide[..., turned:])
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)


class LayerKinds(NamedTuple):
  """What differs from layer to layer; a field is None where none does.

  Attributes:
    rope: [L] bool, whether a layer rotates queries and keys.
    local: [L] bool, whether it reads the newest positions only.
  """

  rope: jax.Array | None = None
  local: jax.Array | None = None

  def at(self, layer: int) -> LayerKinds:
    """The kinds of one layer."""
    return LayerKinds(*(None if a is None else a[layer] for a in self))


def layer_kinds(config: DecoderConfig) -> LayerKinds:
  """The kinds of all layers."""
  def among(layers, sense: bool) -> jax.Array | None:
    if not layers:
      return None
    return jnp.array(
      [(i in layers) == sense for i in range(config.n_layers)], bool)

  return LayerKinds(
    among(config.nope_layers, False), among(config.local_layers, True))


def rotate_keys(
  config: DecoderConfig,
  keys: Float[Array, "L K S H"],
  positions: Int[Array, " S"],
) -> Float[jax.Array, "L K S H"]:
  """Rotates a cache [L, K, S, H] to `positions` [S], once for many queries."""
  tables = rope_tables(config, positions)
  # A loop over layers: else XLA fuses the cosines into the rotation and
  # computes each of them anew for every layer and head.
  return jax.lax.map(
    lambda layer: turn(layer[1], tables, layer[0]), (layer_kinds(config), keys))


def rotate_back(
  config: DecoderConfig,
  keys: Float[Array, "L K S H"],
  positions: Int[Array, " S"],
) -> Float[jax.Array, "L K S H"]:
  """The keys that `rotate_keys` has rotated to `positions` [S]."""
  tables = offset_tables(config, -positions)
  if config.rope_magnitude != 1.0:
    tables = (*(t / config.rope_magnitude for t in tables[:2]), *tables[2:])
  return jax.lax.map(
    lambda layer: turn(layer[1], tables, layer[0]), (layer_kinds(config), keys))


def turn(x: jax.Array, table: tuple[jax.Array, ...], kind: LayerKinds
         ) -> jax.Array:
  """Rotates x [..., S, H] as a layer of this kind does, by its table."""
  cos, sin = table[:2]
  if len(table) > 2 and kind.local is not None:
    cos, sin = (jnp.where(kind.local, near, far)
                for near, far in zip(table[2:], table[:2]))
  turned = rotate(x, cos, sin)
  return turned if kind.rope is None else jnp.where(kind.rope, turned, x)
