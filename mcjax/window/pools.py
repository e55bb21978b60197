"""Pools: keys and values of many rows' slots, and what is done to them.

On a mesh each device holds its own rows, and of them its own key heads (see
`Spread`); what is asked of a row is done where it lies.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mcjax.base import rotation
from mcjax.types import Array
from mcjax.window.spread import ALONE, HEADS, ROWS, Spread


class Pool(NamedTuple):
  """Slots of all rows, layer by layer.

  Attributes:
    keys: [B, K, H, S] each, rotated; channels first, which halves the time of
      a row's scores on a CPU.
    values: [B, K, S, H] each.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


class Held(NamedTuple):
  """What the slots of one row hold.

  Attributes:
    keys: [L, K, H, S], rotated.
    values: [L, K, S, H].
  """

  keys: jax.Array
  values: jax.Array


# The first axes of a pool's arrays, of those of a row and of several.
POOL, HELD, HELD_ROWS = (ROWS, HEADS), (None, HEADS), (None, ROWS, HEADS)
_ROWS = (ROWS,)


@functools.partial(jax.jit, static_argnames=("config", "rows", "slots",
                                             "dtype", "spread"))
def empty(config, rows, slots, dtype, spread: Spread = ALONE) -> Pool:
  """A pool that holds nothing."""
  heads, layers = (rows, config.n_kv_heads), range(config.n_layers)
  return spread.laid(Pool(
    tuple(jnp.zeros((*heads, config.head_dim, slots), dtype) for _ in layers),
    tuple(jnp.zeros((*heads, slots, config.head_dim), dtype) for _ in layers)
  ), POOL)


def _of_row(pools, row):
  """Keys and values of one row, each a list of layers, pools side by side."""
  def one(a):
    return jax.lax.dynamic_index_in_dim(a, row, 0, False)

  keys = [jnp.concatenate([one(a) for a in parts], axis=-1)
          for parts in zip(*(pool.keys for pool in pools))]
  values = [jnp.concatenate([one(a) for a in parts], axis=-2)
            for parts in zip(*(pool.values for pool in pools))]
  return keys, values


def _held(pools, row, slots):
  keys, values = (jnp.stack(part) for part in _of_row(pools, row))
  spare = (0, slots - keys.shape[-1])
  return Held(jnp.pad(keys, (*((0, 0),) * 3, spare)),
              jnp.pad(values, (*((0, 0),) * 2, spare, (0, 0))))


@functools.partial(jax.jit, static_argnames=("slots", "spread"))
def read(pools, row, slots, spread: Spread = ALONE) -> Held:
  """What a row holds, padded to so many slots."""
  def one(pools, row):
    at, mine = spread.own(row, len(pools[0].keys[0]))
    held = _held(pools, at, slots)
    if mine is None:
      return held
    return jax.tree.map(lambda a: jax.lax.psum(
      jnp.where(mine, a, 0), spread.batch), held)

  return spread.split(one, (POOL, ()), HELD)(pools, row)


@functools.partial(jax.jit, static_argnames=("slots", "spread"))
def read_rows(pools, rows, slots, spread: Spread = ALONE) -> Held:
  """What rows [n] hold, [L, n, …]; of each device its own ones."""
  def some(pools, rows):
    return jax.vmap(lambda row: _held(pools, row, slots), out_axes=1)(rows)

  return spread.split(some, (POOL, _ROWS), HELD_ROWS)(pools, rows)


# A row is changed layer by layer: of all layers together these programs took
# seconds to compile.


def layers_of(pools):
  """Of each layer the keys and values of every pool."""
  return list(zip(*(zip(pool.keys, pool.values) for pool in pools)))


def pools_of(layers) -> tuple[Pool, ...]:
  """The pools of such layers."""
  return tuple(Pool(*map(tuple, zip(*pool))) for pool in zip(*layers))


def _joined(layer, row):
  """Keys and values of one row of a layer, its pools side by side."""
  return (jnp.concatenate([
    jax.lax.dynamic_index_in_dim(part, row, 0, False) for part in parts
  ], axis=axis) for parts, axis in zip(zip(*layer), (-1, -2)))


def _with_row(layer, keys, values, row):
  """A layer's pools with the keys and values of one row replaced."""
  out, start = [], 0
  for a, v in layer:
    stop = start + a.shape[-1]
    out.append((
      jax.lax.dynamic_update_slice(
        a, keys[None, :, :, start:stop], (row, 0, 0, 0)),
      jax.lax.dynamic_update_slice(
        v, values[None, :, start:stop], (row, 0, 0, 0))))
    start = stop
  return tuple(out)


@functools.partial(jax.jit, static_argnames="spread", donate_argnums=0)
def replace(layer, held, number, row, spread: Spread = ALONE):
  """A layer with all that one row holds replaced."""
  def one(layer, held, number, row):
    at, mine = spread.own(row, len(layer[0][0]))
    keys, values = held.keys[number], held.values[number]
    if mine is not None:
      old_keys, old_values = _joined(layer, at)
      keys = jnp.where(mine, keys, old_keys)
      values = jnp.where(mine, values, old_values)
    return _with_row(layer, keys, values, at)

  return spread.split(one, (POOL, HELD, (), ()), POOL)(
    layer, held, number, row)


@functools.partial(jax.jit, static_argnames="config")
def tables(config, offsets):
  """Tables that turn keys on by offsets [S]."""
  return rotation.offset_tables(config, offsets)


@functools.partial(jax.jit, static_argnames="config")
def tables_of_rows(config, offsets):
  """The same for offsets [n, S]."""
  return jax.vmap(lambda one: rotation.offset_tables(config, one))(offsets)


def _arranged(config, layer, number, row, order, tables):
  keys, values = (
    jnp.take(part, order, axis=axis, mode="clip")
    for part, axis in zip(_joined(layer, row), (-1, -2)))
  kind = rotation.layer_kinds(config).at(number)
  keys = rotation.turn(keys.swapaxes(1, 2), tables, kind).swapaxes(1, 2)
  return _with_row(layer, keys, values, row)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def arrange(config, layer, number, row, order, tables):
  """A row's slots in another order, its keys then turned by tables [S, R]."""
  return _arranged(config, layer, number, row, order, tables)


@functools.partial(jax.jit, static_argnames=("config", "spread"),
                   donate_argnums=1)
def arrange_rows(config, layer, number, rows, count, orders, tables,
                 spread: Spread = ALONE):
  """The same of rows [n], of each device the first `count` [1] of its own."""
  def some(layer, number, rows, count, orders, tables):
    return jax.lax.fori_loop(0, count[0], lambda i, layer: _arranged(
      config, layer, number, rows[i], orders[i],
      tuple(table[i] for table in tables)), layer)

  return spread.split(some, (POOL, (), *(_ROWS,) * 4), POOL)(
    layer, number, rows, count, orders, tables)


def stored(pools: tuple[Pool, ...], slots: Array, keys, values
           ) -> tuple[Pool, ...]:
  """The pools with new entries in their slots.

  Each slot takes what goes there, if anything does: a scatter into these
  shapes copies the pools twice on a CPU.

  Args:
    pools: near, or near and far.
    slots: [B, T] int32; beyond the last one is padding.
    keys: of each layer [B, K, H, T]; rotated.
    values: of each layer [B, K, T, H].
  """
  out, start = [], 0
  for pool in pools:
    size = pool.keys[0].shape[-1]
    place = jnp.arange(start, start + size, dtype=slots.dtype)
    hits = slots[..., None] == place[None, None]
    new, source = jnp.any(hits, axis=1), jnp.argmax(hits, axis=1)
    out.append(Pool(
      tuple(jnp.where(new[:, None, None], _taken(k, source[:, None, None], -1),
                      a) for a, k in zip(pool.keys, keys)),
      tuple(jnp.where(new[:, None, :, None],
                      _taken(v, source[:, None, :, None], -2), a)
            for a, v in zip(pool.values, values))))
    start += size
  return tuple(out)


def _taken(entries, source, axis):
  return jnp.take_along_axis(
    entries, source, axis=axis, mode="promise_in_bounds")


def _written(layer, keys, values, row, slots):
  """A layer's pools with keys [K, H, T] and values [K, T, H] in one row."""
  one = pools_of([[[jax.lax.dynamic_slice_in_dim(a, row, 1) for a in part]
                   for part in layer]])
  one = stored(one, slots[None], [keys[None]], [values[None]])
  return jax.tree.map(
    lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, row, 0),
    layer, layers_of(one)[0])


@functools.partial(jax.jit, donate_argnums=0)
def write(layer, spliced, number, row, slots):
  """A layer with new entries, [L, …] of all layers, in one row's slots."""
  keys, values = (a[number] for a in spliced)
  return _written(layer, keys, values, row, slots)


@functools.partial(jax.jit, static_argnames="spread", donate_argnums=0)
def write_rows(layer, spliced, number, rows, count, slots,
               spread: Spread = ALONE):
  """The same of rows [n], of each device the first `count` [1] of its own."""
  def some(layer, spliced, number, rows, count, slots):
    keys, values = (a[number] for a in spliced)
    return jax.lax.fori_loop(0, count[0], lambda i, layer: _written(
      layer, keys[i], values[i], rows[i], slots[i]), layer)

  return spread.split(some, (POOL, HELD_ROWS, (), *(_ROWS,) * 3), POOL)(
    layer, spliced, number, rows, count, slots)
