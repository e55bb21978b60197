"""Counterfactual edits: what the next tokens would cost if the window differed.

For every candidate edit the swapped-in entries, the newest token and the true
continuation are run against the cached window with the swapped-out entries
hidden, exactly as a splice would, and nothing is stored: 32 + 1 + H
token-forwards for an expand, 1 + 1 + H for a collapse. Candidates need no free
slots, so they can be asked of a full window, also of blocks that are hidden
below a coarse entry. `slot_gradients` is the cheap estimate: one backward
pass for all raw entries at once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import model
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, Array
from mcjax.window import kv_slots
from mcjax.window.context_lm import ContextLM
from mcjax.window.working_context import (
  COLLAPSE,
  EXPAND,
  Entries,
  out_of_sight,
)


class Candidate(NamedTuple):
  """An edit: EXPAND of an entry, or COLLAPSE of the 32 siblings from it on.

  An EXPAND with a `block` brings in the 32 tokens of that L1 node behind the
  coarse entry above it: what a path of expands would show in the end.
  """

  action: int
  entry: int
  block: int | None = None


class _Batch(NamedTuple):
  """Candidates of one action, stacked: C of them, n swapped-in entries each.

  Attributes:
    positions: [C, S] int32 of the window's slots.
    visible: [C, S] bool, swapped-out slots hidden.
    inputs: [C, n, D] embeddings of the swapped-in entries.
    own_positions: [C, n + 1 + H] int32: swapped in, newest token, continuation.
    own_visible: [C, n + 1 + H] bool.
    own_gists: [C, n + 1 + H] bool, which of them are gists.
  """

  positions: Array
  visible: Array
  inputs: Array
  own_positions: Array
  own_visible: Array
  own_gists: Array


@functools.partial(jax.jit, static_argnames=("config", "together"))
def _losses(params, config, state: kv_slots.KVSlots, batch: _Batch,
            token_ids: jax.Array, together: int) -> jax.Array:
  """NLL [C, H] of the continuation; token_ids [1 + H] start at the newest."""
  tail = model.embed(params, token_ids)

  def one(candidate: _Batch) -> jax.Array:
    window = model.Segment(
      state.keys, state.values, candidate.positions, candidate.visible
    )
    x = jnp.concatenate([candidate.inputs.astype(tail.dtype), tail])
    hidden, _, _ = model.forward(
      params, config, x, candidate.own_positions, (window,),
      candidate.own_visible, gists=candidate.own_gists,
    )
    hidden = hidden[-token_ids.shape[0] : -1]
    return model.token_nll(params, hidden, token_ids[1:])

  return jax.lax.map(one, batch, batch_size=together)


def edit_losses(
  context: ContextLM,
  tree: MegaContextTree,
  candidates: list[Candidate],
  continuation: np.ndarray,
  *,
  pad_to: int = 8,
  together: int = 1,
) -> tuple[float, np.ndarray]:
  """Mean NLL of the continuation as the window is, and after each candidate.

  Args:
    context: a synced window; nothing in it changes.
    tree: gives the inputs of swapped-in nodes.
    candidates: legal edits of the window as it is.
    continuation: [H] int32 true next tokens.
    pad_to: candidates of one action are padded to a multiple of this.
    together: candidates run in one batch; more needs more memory.

  Returns:
    base in nats a token, and [C] nats a token, in the candidates' order.
  """
  e = context.window.entries
  newest = int(tree.tokens(int(e.index[-1]), int(e.index[-1]) + 1)[0])
  ids = np.concatenate([[newest], continuation]).astype(np.int32)
  losses = np.zeros(len(candidates))
  stay = _layout(context, None, len(ids))
  base = _run(context, [stay], ids, pad_to=1, together=1)[0]
  for action in (EXPAND, COLLAPSE):
    rows = [i for i, c in enumerate(candidates) if c.action == action]
    layouts = [_layout(context, candidates[i], len(ids), tree) for i in rows]
    if rows:
      losses[rows] = _run(context, layouts, ids, pad_to, together)
  return float(base), losses


def _run(context, layouts, ids, pad_to, together) -> np.ndarray:
  count = len(layouts)
  layouts = layouts + layouts[:1] * (-count % pad_to)
  batch = _Batch(*(np.stack(parts) for parts in zip(*layouts)))
  out = _losses(
    context.lm.params, context.lm.config, context.state, batch, ids, together
  )
  context.tokens_run += count * batch.own_positions.shape[1]
  return np.asarray(out)[:count].mean(axis=1)


def _layout(context: ContextLM, candidate: Candidate | None, tail: int,
            tree: MegaContextTree | None = None) -> _Batch:
  """Positions, visibility and inputs of one candidate; see `_Batch`.

  The newest token is swapped out too: it is run again with the continuation.
  """
  e = context.window.entries
  at, gone, level, first, size = len(e) - 1, 0, 0, 0, 0
  if candidate is not None:
    at, gone, level, first, size = _swap(e, candidate)
  inputs = np.zeros((max(1, size), context.lm.config.d_model), np.float32)
  if size and tree is not None:
    inputs = context.node_inputs(tree, level, first, size)
  levels = np.concatenate([
    e.level[:at], np.full(size, level), e.level[at + gone : -1],
    np.zeros(tail, e.level.dtype),
  ])
  places = context.positions_of(levels)
  seen = ~out_of_sight(levels, context.window.gists_seen)
  if not context.show_gists:
    seen &= levels == 0
  positions, visible = context.slot_arrays()
  positions[e.slot[:at]] = places[:at]
  positions[e.slot[at + gone : -1]] = places[at + size : len(levels) - tail]
  visible[e.slot[:at]] &= seen[:at]
  visible[e.slot[at + gone : -1]] &= seen[at + size : len(levels) - tail]
  visible[e.slot[at : at + gone]] = False
  visible[e.slot[-1]] = False
  swapped = places[at : at + size] if size else np.zeros(1, np.int32)
  own_visible = np.ones(len(inputs) + tail, bool)
  own_visible[: len(inputs)] = seen[at : at + size] if size else False
  own_gists = np.zeros(len(inputs) + tail, bool)
  own_gists[: len(inputs)] = level > 0
  return _Batch(
    positions, visible, inputs,
    np.concatenate([swapped, places[len(levels) - tail :]]).astype(np.int32),
    own_visible,
    own_gists,
  )


def _swap(e: Entries, candidate: Candidate) -> tuple[int, int, int, int, int]:
  """Where, how many entries go, and level, first node and count of the new."""
  action, at, block = candidate
  if action == COLLAPSE:
    parent = int(e.index[at]) // BRANCHING
    return at, BRANCHING, int(e.level[at]) + 1, parent, 1
  if block is not None and e.level[at] > 1:
    return at + 1, 0, 0, block * BRANCHING, BRANCHING
  return at, 1, int(e.level[at]) - 1, int(e.index[at]) * BRANCHING, BRANCHING


@functools.partial(jax.jit, static_argnames="config")
def _gate_gradient(params, config, state: kv_slots.KVSlots, positions, visible,
                   token_ids, own_positions) -> jax.Array:
  """Gradient [S] of the continuation's NLL for a gain on each slot's values."""

  def nll(gain: jax.Array) -> jax.Array:
    scale = (1 + gain).astype(state.values.dtype)
    values = state.values * scale[None, None, :, None]
    window = model.Segment(state.keys, values, positions, visible)
    hidden, _, _ = model.forward(
      params, config, model.embed(params, token_ids), own_positions, (window,)
    )
    return jnp.mean(model.token_nll(params, hidden[:-1], token_ids[1:]))

  return jax.grad(nll)(jnp.zeros(state.keys.shape[-2], jnp.float32))


def slot_gradients(context: ContextLM, tree: MegaContextTree,
                   continuation: np.ndarray) -> np.ndarray:
  """First-order estimate of what every entry is worth, from one backward pass.

  The continuation is run against the cached window, whose values carry a gain
  per slot; minus the gradient for that gain says, to first order, how many
  nats a token the continuation would lose without the entry.

  Args:
    context: a synced window; nothing in it changes.
    tree: gives the newest token.
    continuation: [H] int32 true next tokens.

  Returns:
    [E] float32 nats a token, in the entries' order.
  """
  e = context.window.entries
  newest = int(tree.tokens(int(e.index[-1]), int(e.index[-1]) + 1)[0])
  ids = np.concatenate([[newest], continuation]).astype(np.int32)
  stay = _layout(context, None, len(ids))
  slopes = _gate_gradient(
    context.lm.params, context.lm.config, context.state, stay.positions,
    stay.visible, ids, stay.own_positions[1:],
  )
  context.tokens_run += 2 * len(ids)  # forwards and backwards
  return -np.asarray(slopes)[e.slot]
