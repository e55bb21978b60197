"""Slot KV cache: each working-context slot owns its keys and values.

Order lives in a position array, not in the layout, so a refocus writes only
the slots that change (`splice`) and leaves every other key and value as it
is. Keys are stored un-rotated: a shift of positions costs no forward pass.
Every function is jitted over fixed shapes; lengths travel as arrays.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from mcjax.base import model
from mcjax.types import BRANCHING, Array

STOP_IDS = 8  # fixed width of the stop-token list, padded with -1


class KVSlots(NamedTuple):
  """Device state of the working context.

  Attributes:
    inputs: [S, D] input embedding (token or gist) held by each slot.
    keys: [L, K, S, H] un-rotated keys.
    values: [L, K, S, H].
  """

  inputs: Float[jax.Array, "S D"]
  keys: Float[jax.Array, "L K S H"]
  values: Float[jax.Array, "L K S H"]


def init(config: model.DecoderConfig, slots: int, dtype) -> KVSlots:
  """Zeroed state for `slots` slots."""
  shape = (config.n_layers, config.n_kv_heads, slots, config.head_dim)
  return KVSlots(
    inputs=jnp.zeros((slots, config.d_model), dtype),
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
  )


@jax.jit
def embed(params, token_ids: Int[Array, " n"]) -> Float[jax.Array, "n D"]:
  """Token embeddings [n, D] of ids [n]."""
  return model.embed(params, token_ids)


@functools.partial(jax.jit, donate_argnums=1)
def load_tokens(params, inputs: Float[jax.Array, "S D"],
                slots: Int[Array, " T"], token_ids: Int[Array, " T"]
                ) -> Float[jax.Array, "S D"]:
  """Puts token embeddings into inputs [S, D] at slots [T]; S drops padding."""
  return inputs.at[slots].set(model.embed(params, token_ids), mode="drop")


@functools.partial(jax.jit, donate_argnums=0)
def load_gists(inputs: Float[jax.Array, "S D"], slots: Int[Array, " T"],
               gists: Float[Array, "T D"]) -> Float[jax.Array, "S D"]:
  """Puts gists [T, D] into inputs [S, D] at slots [T]; S drops padding."""
  return inputs.at[slots].set(gists.astype(inputs.dtype), mode="drop")


def _run(params, config, state, slots, positions, visible, gists):
  """LM over the entries in `slots` against all other visible slots."""
  total = state.inputs.shape[0]
  present = slots < total
  rewritten = jnp.zeros(total, bool).at[slots].set(True, mode="drop")
  x = jnp.take(state.inputs, slots, axis=0, mode="clip")
  own_positions = jnp.take(positions, slots, mode="clip")
  own_visible = jnp.take(visible, slots, mode="clip") & present
  context = model.Segment(
    state.keys, state.values, positions, visible & ~rewritten
  )
  return model.forward(
    params, config, x, own_positions, (context,), own_visible, gists=gists
  )


@functools.partial(jax.jit, static_argnames="config", donate_argnums=2)
def splice(params, config: model.DecoderConfig, state: KVSlots,
           slots: Int[Array, " T"], positions: Int[Array, " S"],
           visible: Bool[Array, " S"], gists: Bool[Array, " T"] | None = None,
           ) -> tuple[KVSlots, Float[jax.Array, "T D"]]:
  """Computes keys and values of the entries in `slots` and stores them.

  Args:
    params: the frozen base's parameters.
    config: static.
    state: donated.
    slots: [T] int32 slots whose inputs are new; S marks padding.
    positions: [S] int32 position of every slot.
    visible: [S] bool, slots the LM may attend to (`slots` included).
    gists: [T] bool, which of `slots` hold gists; none by default.

  Returns:
    The new state and hidden states [T, D] of the entries.
  """
  hidden, keys, values = _run(
    params, config, state, slots, positions, visible, gists)
  return state._replace(
    keys=state.keys.at[:, :, slots].set(keys, mode="drop"),
    values=state.values.at[:, :, slots].set(values, mode="drop"),
  ), hidden


@functools.partial(jax.jit, static_argnames="config")
def peek(params, config: model.DecoderConfig, state: KVSlots,
         slots: Int[Array, " T"], positions: Int[Array, " S"],
         visible: Bool[Array, " S"], gists: Bool[Array, " T"] | None = None,
         ) -> Float[jax.Array, "T D"]:
  """As `splice`, but stores nothing: hidden states [T, D] only."""
  return _run(params, config, state, slots, positions, visible, gists)[0]


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
