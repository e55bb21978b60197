"""RowCache: the keys and values of many windows, a row each, held once.

Decoding reads what is stored, as it is stored, and writes beside it; so keys
carry the rotation of the position where they stand. An entry that moves is
turned on by the difference: no forward pass, and nothing at all while it stays.

Slots are in two pools, near and far. Rows whose visible entries all lie near
are decoded from the near pool alone (see `ContextLM`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import rotation
from mcjax.base.decoder_config import DecoderConfig
from mcjax.types import BRANCHING, Array

_SHARE = 4  # the near pool is the window divided by this
_LEAST = 256  # and at least so many slots
_PRIOR_SHARE = 10  # slots of prompt and answer alone, the same way
_PRIOR_LEAST = 160


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


def near_slots(window: int) -> int:
  """Slots of the near pool in a window of so many."""
  return min(window, max(_LEAST, (window - BRANCHING) // _SHARE))


def prior_slots(window: int) -> int:
  """Slots for prompt and answer alone beside a window of so many."""
  share = window // _PRIOR_SHARE // BRANCHING * BRANCHING
  return min(window, max(_PRIOR_LEAST, share))


@functools.partial(jax.jit, static_argnames=("config", "rows", "slots",
                                             "dtype"))
def _empty(config, rows, slots, dtype):
  heads, layers = (rows, config.n_kv_heads), range(config.n_layers)
  return Pool(
    tuple(jnp.zeros((*heads, config.head_dim, slots), dtype) for _ in layers),
    tuple(jnp.zeros((*heads, slots, config.head_dim), dtype) for _ in layers))


def _of_row(pools, row):
  """Keys and values of one row, each a list of layers, pools side by side."""
  def one(a):
    return jax.lax.dynamic_index_in_dim(a, row, 0, False)

  keys = [jnp.concatenate([one(a) for a in parts], axis=-1)
          for parts in zip(*(pool.keys for pool in pools))]
  values = [jnp.concatenate([one(a) for a in parts], axis=-2)
            for parts in zip(*(pool.values for pool in pools))]
  return keys, values


@functools.partial(jax.jit, static_argnames="slots")
def _read(pools, row, slots):
  keys, values = (jnp.stack(part) for part in _of_row(pools, row))
  spare = (0, slots - keys.shape[-1])
  return Held(jnp.pad(keys, (*((0, 0),) * 3, spare)),
              jnp.pad(values, (*((0, 0),) * 2, spare, (0, 0))))


@functools.partial(jax.jit, static_argnames="slots")
def _read_rows(pools, rows, slots):
  """What rows [n] hold, [L, n, …]."""
  return jax.vmap(lambda row: _read(pools, row, slots), out_axes=1)(rows)


# A row is changed layer by layer: of all layers together these programs took
# seconds to compile.


def _layers(pools):
  """Of each layer the keys and values of every pool."""
  return list(zip(*(zip(pool.keys, pool.values) for pool in pools)))


def _pools(layers) -> tuple[Pool, ...]:
  return tuple(Pool(*map(tuple, zip(*pool))) for pool in zip(*layers))


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


@functools.partial(jax.jit, donate_argnums=0)
def _replace(layer, held, number, row):
  return _with_row(layer, held.keys[number], held.values[number], row)


@functools.partial(jax.jit, static_argnames="config")
def _tables(config, offsets):
  return rotation.offset_tables(config, offsets)


@functools.partial(jax.jit, static_argnames="config")
def _tables_of_rows(config, offsets):
  return jax.vmap(lambda one: rotation.offset_tables(config, one))(offsets)


def _arranged(config, layer, number, row, order, tables):
  """A row's slots in another order, its keys then turned by tables [S, R]."""
  keys, values = (jnp.take(jnp.concatenate([
    jax.lax.dynamic_index_in_dim(part, row, 0, False) for part in parts
  ], axis=axis), order, axis=axis, mode="clip")
    for parts, axis in zip(zip(*layer), (-1, -2)))
  kind = rotation.layer_kinds(config).at(number)
  keys = rotation.turn(keys.swapaxes(1, 2), tables, kind).swapaxes(1, 2)
  return _with_row(layer, keys, values, row)


_arrange = jax.jit(_arranged, static_argnames="config", donate_argnums=1)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def _turn_rows(config, layer, number, rows, count, tables):
  """The keys of the first `count` of rows [n], turned by tables [n, S, R]."""
  order = jnp.arange(tables[0].shape[1], dtype=jnp.int32)
  return jax.lax.fori_loop(0, count, lambda i, layer: _arranged(
    config, layer, number, rows[i], order,
    tuple(table[i] for table in tables)), layer)


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
  one = _pools([[[jax.lax.dynamic_slice_in_dim(a, row, 1) for a in part]
                 for part in layer]])
  one = stored(one, slots[None], [keys[None]], [values[None]])
  return jax.tree.map(
    lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, row, 0),
    layer, _layers(one)[0])


@functools.partial(jax.jit, donate_argnums=0)
def _write(layer, spliced, number, row, slots):
  keys, values = (a[number] for a in spliced)
  return _written(layer, keys, values, row, slots)


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(layer, spliced, number, rows, count, slots):
  """New entries [L, n, …] in the first `count` of rows [n]."""
  keys, values = (a[number] for a in spliced)
  return jax.lax.fori_loop(0, count, lambda i, layer: _written(
    layer, keys[i], values[i], rows[i], slots[i]), layer)


class RowCache:
  """The cache of B rows; whoever uses it must hold the decoder's turn.

  What is done to several rows together takes up to `width` of them.

  Attributes:
    slots: of a row.
    near: slots of the near pool; a far one has the others, if there are any.
    width: see above.
    lost: how often its contents were lost, in work that was cut off.
  """

  def __init__(self, config: DecoderConfig, rows: int, slots: int, dtype,
               near: int, width: int = 1):
    self.slots, self.near, self.width, self.lost = slots, near, width, 0
    self._config, self._rows, self._dtype = config, rows, dtype
    self._positions = np.zeros((rows, slots), np.int32)
    self._pools = {name: self._empty(name) for name in self._names()}
    self._missing: set[str] = set()

  def _names(self) -> tuple[str, ...]:
    return ("near", "far")[: 1 + (self.slots > self.near)]

  def _empty(self, name: str) -> Pool:
    size = self.near if name == "near" else self.slots - self.near
    return _empty(self._config, self._rows, size, self._dtype)

  def notice(self) -> bool:
    """Begins anew where the pools were taken and never given back.

    Returns:
      Whether so: no row holds anything then.
    """
    if not self._missing:
      return False
    self._pools |= {name: self._empty(name) for name in self._missing}
    self._missing.clear()
    self.lost += 1
    return True

  def take(self, far: bool = True) -> tuple[Pool, ...]:
    """The pools, to be donated; `give` must follow.

    Args:
      far: whether the far one is wanted too, if there is one.
    """
    self.notice()
    names = self._names()[: 1 + far]
    self._missing.update(names)
    return tuple(self._pools.pop(name) for name in names)

  def give(self, pools: tuple[Pool, ...]) -> None:
    """Puts the pools back."""
    self._pools.update(zip(("near", "far"), pools))
    self._missing.clear()

  def read(self, row: int, slots: int = 0) -> tuple[Held, np.ndarray]:
    """What a row holds, and the positions [S] that its keys are rotated to.

    Padded with empty slots to at least `slots`.
    """
    pools = self.take()
    self.give(pools)
    size = max(slots, self.slots)
    held = _read(pools, np.int32(row), size)
    return held, np.pad(self._positions[row], (0, size - self.slots))

  def replace(self, row: int, held: Held, positions: np.ndarray) -> None:
    """Replaces all that a row holds; as `read` gave it."""
    self._each(lambda layer, n: _replace(layer, held, n, np.int32(row)))
    self._positions[row] = positions

  def write(self, row: int, slots: np.ndarray, keys: jax.Array,
            values: jax.Array, positions: np.ndarray) -> None:
    """Stores new entries.

    Args:
      slots: [T] int32, padded with the number of slots or more.
      keys, values: [L, K, H, T] rotated, [L, K, T, H].
      positions: [S] where the keys stand.
    """
    used = slots[slots < self.slots]
    self._each(lambda layer, n: _write(
      layer, (keys, values), n, np.int32(row), slots))
    self.mark(row, used, positions)

  def mark(self, row: int, slots: np.ndarray, positions: np.ndarray) -> None:
    """Notes that slots hold keys that stand at their positions of [S]."""
    self._positions[row, slots] = positions[slots]

  def move(self, row: int, positions: np.ndarray, visible: np.ndarray) -> None:
    """Turns the keys that are visible, [S] bool, to positions [S]."""
    offsets = np.where(visible, positions - self._positions[row], 0)
    if np.any(offsets):
      self._arranged(row, np.arange(self.slots), offsets)
      self._positions[row] += offsets

  def permute(self, row: int, order: np.ndarray) -> None:
    """Slot i gets what was in slot order[i]."""
    self._arranged(row, order, np.zeros(self.slots, np.int32))
    self._positions[row] = self._positions[row][order]

  def _arranged(self, row: int, order: np.ndarray, offsets: np.ndarray
                ) -> None:
    order = order.astype(np.int32)
    tables = _tables(self._config, offsets.astype(np.int32))
    self._each(lambda layer, n: _arrange(
      self._config, layer, n, np.int32(row), order, tables))

  def _each(self, change) -> None:
    """Changes the pools of every layer, given with its number."""
    layers = _layers(self.take())
    self.give(_pools([
      change(layer, np.int32(n)) for n, layer in enumerate(layers)]))

  # --- several rows -------------------------------------------------------

  def read_rows(self, rows: list[int], slots: int) -> Held:
    """What each of them holds, [L, width, …]; padded as `read` does."""
    pools = self.take()
    self.give(pools)
    return _read_rows(pools, self._padded(rows)[0], max(slots, self.slots))

  def write_rows(self, rows: list[int], slots: np.ndarray, keys: jax.Array,
                 values: jax.Array, positions: list[np.ndarray]) -> None:
    """As `write`; slots [width, T], keys and values [L, width, …]."""
    where, count = self._padded(rows)
    self._each(lambda layer, n: _write_rows(
      layer, (keys, values), n, where, count, slots))
    for row, own, places in zip(rows, slots, positions):
      self.mark(row, own[own < self.slots], places)

  def move_rows(self, rows: list[int], positions: list[np.ndarray],
                visible: list[np.ndarray]) -> None:
    """As `move` of each of them."""
    offsets = {row: np.where(seen, places - self._positions[row], 0)
               for row, places, seen in zip(rows, positions, visible)}
    moved = [row for row in rows if offsets[row].any()]
    if moved:
      self.turn_rows(moved, np.array([offsets[row] for row in moved]))

  def turn_rows(self, rows: list[int], offsets: np.ndarray) -> None:
    """Turns the keys of rows on by offsets [n, S]."""
    (where, count), spare = self._padded(rows), self.width - len(rows)
    tables = _tables_of_rows(self._config, np.pad(
      offsets.astype(np.int32), ((0, spare), (0, 0))))
    self._each(lambda layer, n: _turn_rows(
      self._config, layer, n, where, count, tables))
    self._positions[rows] += offsets

  def _padded(self, rows: list[int]) -> tuple[np.ndarray, np.int32]:
    spare = 0, self.width - len(rows)
    return np.pad(np.array(rows, np.int32), spare), np.int32(len(rows))
