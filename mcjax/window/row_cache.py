"""RowCache: the keys and values of many windows, a row each, held once.

Decoding reads what is stored, as it is stored, and writes beside it; so keys
carry the rotation of the position where they stand. An entry that moves is
turned on by the difference: no forward pass, and nothing at all while it stays.

Slots are in two pools, near and far. Rows whose visible entries all lie near
are decoded from the near pool alone (see `ContextLM`).
"""

from __future__ import annotations

import jax
import numpy as np

from mcjax.base.decoder_config import DecoderConfig
from mcjax.types import BRANCHING
from mcjax.window import pools
from mcjax.window.pools import Held, Pool
from mcjax.window.spread import ALONE, Spread

_SHARE = 4  # the near pool is the window divided by this
_LEAST = 256  # and at least so many slots
_PRIOR_SHARE = 10  # slots of prompt and answer alone, the same way
_PRIOR_LEAST = 160


def near_slots(window: int) -> int:
  """Slots of the near pool in a window of so many."""
  return min(window, max(_LEAST, (window - BRANCHING) // _SHARE))


def prior_slots(window: int) -> int:
  """Slots for prompt and answer alone beside a window of so many."""
  share = window // _PRIOR_SHARE // BRANCHING * BRANCHING
  return min(window, max(_PRIOR_LEAST, share))


class RowCache:
  """The cache of B rows; whoever uses it must hold the decoder's turn.

  What is done to several rows together takes up to `width` of them, on a mesh
  an equal share of each device's (see `lanes`).

  Attributes:
    slots: of a row.
    near: slots of the near pool; a far one has the others, if there are any.
    width: see above.
    lost: how often its contents were lost, in work that was cut off.
  """

  def __init__(self, config: DecoderConfig, rows: int, slots: int, dtype,
               near: int, width: int = 1, spread: Spread = ALONE):
    self.slots, self.near, self.width, self.lost = slots, near, width, 0
    self._config, self._rows, self._dtype = config, rows, dtype
    self._spread = spread
    self._positions = np.zeros((rows, slots), np.int32)
    self._pools = {name: self._empty(name) for name in self._names()}
    self._missing: set[str] = set()

  def _names(self) -> tuple[str, ...]:
    return ("near", "far")[: 1 + (self.slots > self.near)]

  def _empty(self, name: str) -> Pool:
    size = self.near if name == "near" else self.slots - self.near
    return pools.empty(
      self._config, self._rows, size, self._dtype, self._spread)

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

  def give(self, taken: tuple[Pool, ...]) -> None:
    """Puts the pools back."""
    self._pools.update(zip(("near", "far"), taken))
    self._missing.clear()

  def _looked_at(self) -> tuple[Pool, ...]:
    taken = self.take()
    self.give(taken)
    return taken

  def read(self, row: int, slots: int = 0) -> tuple[Held, np.ndarray]:
    """What a row holds, and the positions [S] that its keys are rotated to.

    Padded with empty slots to at least `slots`. That of a mesh comes as a copy
    on the host.
    """
    size = max(slots, self.slots)
    held = pools.read(self._looked_at(), np.int32(row), size, self._spread)
    if self._spread.mesh is not None:
      held = jax.device_get(held)
    return held, np.pad(self._positions[row], (0, size - self.slots))

  def replace(self, row: int, held: Held, positions: np.ndarray) -> None:
    """Replaces all that a row holds; as `read` gave it."""
    self._each(lambda layer, n: pools.replace(
      layer, held, n, np.int32(row), self._spread))
    self._positions[row] = positions

  def write(self, row: int, slots: np.ndarray, keys: jax.Array,
            values: jax.Array, positions: np.ndarray) -> None:
    """Stores new entries; without a mesh.

    Args:
      slots: [T] int32, padded with the number of slots or more.
      keys, values: [L, K, H, T] rotated, [L, K, T, H].
    """
    used = slots[slots < self.slots]
    self._each(lambda layer, n: pools.write(
      layer, (keys, values), n, np.int32(row), slots))
    self.mark(row, used, positions)

  def mark(self, row: int, slots: np.ndarray, positions: np.ndarray) -> None:
    """Notes that slots hold keys that stand at their positions of [S]."""
    self._positions[row, slots] = positions[slots]

  def move(self, row: int, positions: np.ndarray, visible: np.ndarray) -> None:
    """Turns the keys that are visible, [S] bool, to positions [S]."""
    self.move_rows([row], [positions], [visible])

  def permute(self, row: int, order: np.ndarray) -> None:
    """Slot i gets what was in slot order[i]."""
    self.arrange([row], order[None], np.zeros((1, self.slots), np.int32))
    self._positions[row] = self._positions[row][order]

  def arrange(self, rows: list[int], orders: np.ndarray, offsets: np.ndarray
              ) -> None:
    """Other orders [n, S] of rows' slots, then keys turned by [n, S]."""
    orders, offsets = orders.astype(np.int32), offsets.astype(np.int32)
    if len(rows) == 1 and self._spread.mesh is None:
      tables = pools.tables(self._config, offsets[0])
      self._each(lambda layer, n: pools.arrange(
        self._config, layer, n, np.int32(rows[0]), orders[0], tables))
      return
    where, count = self._group(rows)
    orders, offsets = (self.padded(rows, part) for part in (orders, offsets))
    tables = pools.tables_of_rows(self._config, offsets)
    self._each(lambda layer, n: pools.arrange_rows(
      self._config, layer, n, where, count, orders, tables, self._spread))

  def _each(self, change) -> None:
    """Changes the pools of every layer, given with its number."""
    layers = pools.layers_of(self.take())
    self.give(pools.pools_of([
      change(layer, np.int32(n)) for n, layer in enumerate(layers)]))

  # --- several rows -------------------------------------------------------

  def lanes(self, rows: list[int]) -> np.ndarray:
    """Where [n] each row stands in a group of `width`, by its device."""
    parts = np.array(rows) // (self._rows // self._spread.parts)
    before = [np.count_nonzero(parts[:n] == part)
              for n, part in enumerate(parts)]
    return parts * (self.width // self._spread.parts) + before

  def fits(self, rows: list[int]) -> bool:
    """Whether they are few enough, of each device, to go together."""
    parts = np.array(rows) // (self._rows // self._spread.parts)
    return np.bincount(parts).max() <= self.width // self._spread.parts

  def padded(self, rows: list[int], values, fill: int = 0) -> np.ndarray:
    """Values [n, …] of rows as [width, …], each in its lane."""
    values = np.asarray(values)
    out = np.full((self.width, *values.shape[1:]), fill, values.dtype)
    out[self.lanes(rows)] = values
    return out

  def _group(self, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows [width] by their numbers on their devices; how many are there."""
    parts, share = self._spread.parts, self._rows // self._spread.parts
    own = np.array(rows, np.int32)
    count = np.bincount(own // share, minlength=parts).astype(np.int32)
    return self.padded(rows, own % share), count

  def read_rows(self, rows: list[int], slots: int) -> Held:
    """What each of them holds, [L, width, …]; padded as `read` does."""
    return pools.read_rows(self._looked_at(), self._group(rows)[0],
                           max(slots, self.slots), self._spread)

  def write_rows(self, rows: list[int], slots: list[np.ndarray],
                 keys: jax.Array, values: jax.Array,
                 positions: list[np.ndarray]) -> None:
    """As `write`, of each; keys and values [L, width, …] by lane."""
    where, count = self._group(rows)
    padded = self.padded(rows, slots, self.slots)
    self._each(lambda layer, n: pools.write_rows(
      layer, (keys, values), n, where, count, padded, self._spread))
    for row, own, places in zip(rows, slots, positions):
      self.mark(row, own[own < self.slots], places)

  def move_rows(self, rows: list[int], positions: list[np.ndarray],
                visible: list[np.ndarray]) -> None:
    """As `move` of each of them."""
    offsets = {row: np.where(seen, places - self._positions[row], 0)
               for row, places, seen in zip(rows, positions, visible)}
    moved = [row for row in rows if offsets[row].any()]
    if not moved:
      return
    turned = np.array([offsets[row] for row in moved])
    self.arrange(moved, np.tile(np.arange(self.slots), (len(moved), 1)), turned)
    self._positions[moved] += turned
