"""Slot KV cache: each working-context slot owns its keys and values.

Order lives in a position array, not in the layout, so a refocus writes only
the slots that change (`splice`) and leaves every other key and value as it
is. Keys are stored un-rotated: a shift of positions costs no forward pass.
Every function is jitted over fixed shapes; lengths travel as arrays.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key
import numpy as np

from mcjax.base import model
from mcjax.types import BRANCHING, Array

STOP_IDS = 8  # fixed width of the stop-token list, padded with -1
_PLAUSIBLE = 0.1  # of the likeliest token's probability, to be picked at all


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


class View(NamedTuple):
  """The window as decoding reads it: one [K, S, H] array a layer.

  Attributes:
    keys: rotated to the slots' positions.
    values: as in the state.
  """

  keys: tuple[Float[jax.Array, "K S H"], ...]
  values: tuple[Float[jax.Array, "K S H"], ...]


class Prior(NamedTuple):
  """The LM without the text it answers from, for context-aware decoding.

  Attributes:
    positions: [S] int32, in a cache of its own.
    visible: [S] bool.
    first_position: int32 position of the first new token.
    logits: [V] float32 for the first new token.
    weight: float32, how much what the text adds counts beyond itself.
  """

  positions: Int[Array, " S"]
  visible: Bool[Array, " S"]
  first_position: Int[Array, ""] | np.integer
  logits: Float[Array, " V"]
  weight: Float[Array, ""] | np.floating


class Decoded(NamedTuple):
  """Result of `decode_block`.

  Attributes:
    tokens: [32] int32, valid up to `count`.
    count: int32 number of tokens generated.
    stopped: bool, the last token is a stop token.
    logits: [V] float32 for the token after the last one.
    prior: state and logits of the same without the text, where it was asked.
  """

  tokens: Int[jax.Array, " T"]
  count: Int[jax.Array, ""]
  stopped: Bool[jax.Array, ""]
  logits: Float[jax.Array, " V"]
  prior: tuple[KVSlots, Float[jax.Array, " V"]] | None = None


def init(config: model.DecoderConfig, slots: int, dtype) -> KVSlots:
  """Zeroed state for `slots` slots."""
  shape = (config.n_layers, config.n_kv_heads, slots, config.head_dim)
  return KVSlots(
    inputs=jnp.zeros((slots, config.d_model), dtype),
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
  )


def init_view(config: model.DecoderConfig, slots: int, dtype) -> View:
  """A view of nothing, for `look` to write into."""
  shape = (config.n_kv_heads, slots, config.head_dim)
  layers = range(config.n_layers)
  return View(
    tuple(jnp.zeros(shape, dtype) for _ in layers),
    tuple(jnp.zeros(shape, dtype) for _ in layers),
  )


def look(config: model.DecoderConfig, old: View, state: KVSlots,
         positions: Int[Array, " S"]) -> View:
  """The state's view at `positions` [S], in the memory of `old` (donated).

  Fresh memory would cost more than the work: the system clears every page.
  """
  return _look(config, old, state, _rope(config, positions))


@functools.partial(jax.jit, static_argnames="config")
def _rope(config, positions):
  # A program of its own: else the cosines are fused into every rotation.
  return model.rope_tables(config, positions)


@functools.partial(
  jax.jit, static_argnames="config", donate_argnums=1, keep_unused=True
)
def _look(config, old, state, tables):
  del old
  kinds = model.layer_kinds(config)
  keys = tuple(
    state.keys[i] if i in config.nope_layers
    else model.turn(state.keys[i], tables, kinds.at(i)._replace(rope=None))
    for i in range(config.n_layers)
  )
  return View(keys, tuple(state.values))


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


def _against(logits, prior, weight):
  """Logits [V] by context-aware decoding: those of plausible tokens, and the
  more the likelier the text makes them."""
  beside, without = jax.nn.log_softmax(logits), jax.nn.log_softmax(prior)
  plausible = beside >= jnp.max(beside) + math.log(_PLAUSIBLE)
  return jnp.where(plausible, beside + weight * (beside - without), -jnp.inf)


class _Stream(NamedTuple):
  """One cache while a block is decoded: the window, and the block's own."""

  window: model.Segment
  first_position: jax.Array
  keys: jax.Array
  values: jax.Array
  turned: jax.Array
  logits: jax.Array

  @classmethod
  def make(cls, config, state, view, positions, visible, first, logits, size):
    keys, values = view or (
      model.rotate_keys(config, state.keys, positions), state.values)
    zeros = jnp.zeros(
      (config.n_layers, config.n_kv_heads, size, config.head_dim),
      state.keys.dtype)
    window = model.Segment(keys, values, positions, visible, rotated=True)
    return cls(window, first, zeros, zeros, zeros, logits)

  def carried(self):
    """What a token changes."""
    return self.keys, self.values, self.turned, self.logits

  def advance(self, params, config, carried, i, x):
    """`carried` after the block's token number `i`, of input x [1, D]."""
    keys, values, turned, _ = carried
    offsets = jnp.arange(keys.shape[2], dtype=jnp.int32)
    block = model.Segment(
      turned, values, self.first_position + offsets, offsets < i, rotated=True)
    place = (self.first_position + i)[None]
    hidden, k, v = model.forward(
      params, config, x, place, (self.window, block))
    at = (0, 0, i, 0)
    return (
      jax.lax.dynamic_update_slice(keys, k, at),
      jax.lax.dynamic_update_slice(values, v, at),
      jax.lax.dynamic_update_slice(
        turned, model.rotate_keys(config, k, place), at),
      model.unembed(params, hidden[0]),
    )


@functools.partial(
  jax.jit, static_argnames="config", donate_argnames=("state", "prior_state"))
def decode_block(
  params,
  config: model.DecoderConfig,
  state: KVSlots,
  slots: Int[Array, " T"],
  positions: Int[Array, " S"],
  visible: Bool[Array, " S"],
  first_position: Int[Array, ""],
  logits: Float[Array, " V"],
  limit: Int[Array, ""],
  stop_ids: Int[Array, " stops"],
  temperature: Float[Array, ""],
  key: Key[jax.Array, ""],
  view: View | None = None,
  prior_state: KVSlots | None = None,
  prior: Prior | None = None,
) -> tuple[KVSlots, Decoded]:
  """Decodes up to `limit` <= 32 tokens in one device loop, no host sync.

  The window's keys are rotated once for the whole block; the block's own keys
  live in small buffers, rotated as they come, and enter their slots when the
  loop ends.

  Args:
    params: the frozen base's parameters.
    config: static.
    state: donated.
    slots: [32] int32 free slots for the new tokens.
    positions: [S] int32.
    visible: [S] bool.
    first_position: int32 position of the first new token.
    logits: [V] float32 for the first new token.
    limit: int32 tokens wanted.
    stop_ids: [8] int32, -1 pads; decoding ends after one of them.
    temperature: float32, 0 is greedy.
    key: PRNG key.
    view: what `look` made of this state and these positions; made here from
      the stacked state where it is None.
    prior_state: donated; another cache of the same slots, for `prior`.
    prior: decoding is held against it; two forward passes a token then.

  Returns:
    The new state and a `Decoded`.
  """
  size = slots.shape[0]
  streams = [_Stream.make(config, state, view, positions, visible,
                          first_position, logits, size)]
  if prior is not None:
    streams.append(_Stream.make(config, prior_state, None, *prior[:4], size))
  offsets = jnp.arange(size, dtype=jnp.int32)

  def unfinished(carry):
    i, stopped, *_ = carry
    return (i < limit) & ~stopped

  def step(carry):
    i, _, tokens, inputs, carried = carry
    found = carried[0][-1]
    if prior is not None:
      found = _against(found, carried[1][-1], prior.weight)
    token = model.sample(found, temperature, jax.random.fold_in(key, i))
    x = model.embed(params, token[None])
    return (
      i + 1,
      jnp.any(token == stop_ids),
      tokens.at[i].set(token),
      jax.lax.dynamic_update_slice(inputs, x, (i, 0)),
      [s.advance(params, config, c, i, x) for s, c in zip(streams, carried)],
    )

  count, stopped, tokens, inputs, carried = jax.lax.while_loop(
    unfinished,
    step,
    (
      jnp.int32(0),
      jnp.bool_(False),
      jnp.zeros(size, jnp.int32),
      jnp.zeros((size, state.inputs.shape[1]), state.inputs.dtype),
      [s.carried() for s in streams],
    ),
  )
  used = jnp.where(offsets < count, slots, state.inputs.shape[0])

  def written(state, keys, values):
    return KVSlots(
      state.inputs.at[used].set(inputs, mode="drop"),
      state.keys.at[:, :, used].set(keys, mode="drop"),
      state.values.at[:, :, used].set(values, mode="drop"),
    )

  without = None
  if prior is not None:
    keys, values, _, logits = carried[1]
    without = written(prior_state, keys, values), logits
  keys, values, _, logits = carried[0]
  return (written(state, keys, values),
          Decoded(tokens, count, stopped, logits, without))


def splice_sizes(max_edits: int) -> tuple[int, ...]:
  """Padded sizes of `splice`: e expands, the rest collapses, one last token."""
  sizes = [e * BRANCHING + max_edits + 1 for e in range(max_edits + 1)]
  return tuple(-(-size // 8) * 8 for size in sizes)


def pad(values: np.ndarray, size: int, fill: int) -> np.ndarray:
  """Values [n] filled up to [size]; the window's size marks empty slots."""
  return np.pad(values, (0, size - len(values)), constant_values=fill)
