"""Slot KV cache: each working-context slot owns its keys and values.

Order lives in a position array, not in the layout, so a refocus computes only
the slots that change (`splice`) and leaves every other key and value as it
is. Every function is jitted over fixed shapes; lengths travel as arrays.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from mcjax.base import model, rotation
from mcjax.types import BRANCHING, Array
from mcjax.window.pools import HELD_ROWS, Held
from mcjax.window.spread import ALONE, Spread

STOP_IDS = 8  # fixed width of the stop-token list, padded with -1


class KVSlots(NamedTuple):
  """What a window's slots hold, by itself, for those who look at it.

  Attributes:
    keys: [L, K, S, H] un-rotated keys.
    values: [L, K, S, H].
  """

  keys: Float[jax.Array, "L K S H"]
  values: Float[jax.Array, "L K S H"]


class Spliced(NamedTuple):
  """What `splice` has computed for T entries.

  Attributes:
    hidden: [T, D] after the final norm.
    keys: [L, K, H, T], rotated to where the entries stand.
    values: [L, K, T, H].
  """

  hidden: Float[jax.Array, "T D"]
  keys: Float[jax.Array, "L K H T"]
  values: Float[jax.Array, "L K T H"]


@jax.jit
def embed(params, token_ids: Int[Array, " n"]) -> Float[jax.Array, "n D"]:
  """Token embeddings [n, D] of ids [n]."""
  return model.embed(params, token_ids)


@functools.partial(jax.jit, static_argnames=("config", "width"))
def splice(params, config: model.DecoderConfig, held: Held,
           slots: Int[Array, " T"], ids: Int[Array, " T"],
           gists: Float[Array, "T D"], is_gist: Bool[Array, " T"],
           positions: Int[Array, " S"], visible: Bool[Array, " S"],
           width: int = 0) -> Spliced:
  """The LM over the entries in `slots` against all other visible slots.

  Args:
    params: the frozen base's parameters.
    config: static.
    held: what the slots hold, rotated to `positions`.
    slots: [T] int32 slots whose inputs are new; S marks padding.
    ids: [T] int32 tokens that they hold,
    gists: [T, D] or gists,
    is_gist: [T] bool, where so.
    positions: [S] int32 position of every slot.
    visible: [S] bool, slots the LM may attend to (`slots` included).
    width: keys and values are padded to so many entries.
  """
  total = positions.shape[0]
  present = slots < total
  rewritten = jnp.zeros(total, bool).at[slots].set(True, mode="drop")
  x = model.embed(params, ids)
  x = jnp.where(is_gist[:, None], gists.astype(x.dtype), x)
  own_positions = jnp.take(positions, slots, mode="clip")
  context = model.Segment(
    held.keys, held.values, positions, visible & ~rewritten, rotated=True,
    channels_first=True)
  hidden, keys, values = model.forward(
    params, config, x, own_positions, (context,),
    jnp.take(visible, slots, mode="clip") & present, gists=is_gist)
  keys = rotation.rotate_keys(config, keys, own_positions).swapaxes(2, 3)
  spare = (0, max(0, width - slots.shape[0]))
  return Spliced(hidden, jnp.pad(keys, (*((0, 0),) * 3, spare)),
                 jnp.pad(values, (*((0, 0),) * 2, spare, (0, 0))))


@functools.partial(jax.jit, static_argnames=("config", "width", "spread"))
def splice_rows(params, config: model.DecoderConfig, held: Held,
                slots: Int[Array, "n T"], ids: Int[Array, "n T"],
                gists: Float[Array, "n T D"], is_gist: Bool[Array, "n T"],
                positions: Int[Array, "n S"], visible: Bool[Array, "n S"],
                width: int = 0, spread: Spread = ALONE) -> Spliced:
  """As `splice`, of n rows together: the weights are read once for all.

  Args:
    held: [L, n, …]; the others with n in front.
    spread: of the rows.

  Returns:
    hidden [n, T, D], every device's; keys and values [L, n, …].
  """
  def one(held, *row):
    return tuple(splice(params, config, held, *row, width))

  rows = jax.vmap(one, in_axes=(1, *(0,) * 6), out_axes=(0, 1, 1))
  hidden, *new = rows(held, slots, ids, gists, is_gist, positions, visible)
  return Spliced(spread.laid(hidden, ()), *spread.laid(new, HELD_ROWS))


@jax.jit
def hidden_of(hidden: jax.Array, number: jax.Array) -> jax.Array:
  """One row's [T, D] of hidden [n, T, D]."""
  return jax.lax.dynamic_index_in_dim(hidden, number, 0, False)


@functools.partial(jax.jit, static_argnames="config")
def at_rest(config: model.DecoderConfig, held: Held,
            positions: Int[Array, " S"]) -> KVSlots:
  """The same slots by themselves, their keys turned back from positions."""
  keys = held.keys.swapaxes(2, 3)
  return KVSlots(rotation.rotate_back(config, keys, positions), held.values)


@functools.partial(jax.jit, static_argnames="config")
def at_work(config: model.DecoderConfig, state: KVSlots,
            positions: Int[Array, " S"]) -> Held:
  """What a cache holds of slots that stand at positions [S]."""
  keys = rotation.rotate_keys(config, state.keys, positions)
  return Held(keys.swapaxes(2, 3), state.values)


@jax.jit
def next_logits(params, hidden: Float[Array, "T D"], row: Int[Array, ""]
                ) -> Float[jax.Array, " V"]:
  """Logits [V] float32 from row `row` of hidden [T, D]."""
  return model.unembed(params, hidden[row])


@jax.jit
def nll(params, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
        ) -> Float[jax.Array, " T"]:
  """NLL [T] in nats: targets[t] given hidden[t] (the entry before it)."""
  return model.token_nll(params, hidden, targets)


def splice_sizes(max_edits: int) -> tuple[int, ...]:
  """Padded sizes of `splice`: e expands, the rest collapses, one last token."""
  sizes = [e * BRANCHING + max_edits + 1 for e in range(max_edits + 1)]
  return tuple(-(-size // 8) * 8 for size in sizes)


def pad(values: np.ndarray, size: int, fill: int) -> np.ndarray:
  """Values [n] filled up to [size]; the window's size marks empty slots."""
  return np.pad(values, (0, size - len(values)), constant_values=fill)
