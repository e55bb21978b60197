"""FocusAllocator: signed scores to a legal, budgeted edit plan.

Greedy with two queues: expands by descending score, collapses of 32-sibling
groups by ascending mean score, at most N_diff edits. An expand costs 31 slots
and is paid from free slots or by a collapse in the same plan; collapses below
the threshold happen under budget too, so that focus can trade. One jitted
function of fixed shape; the host legalises by masks and applies the plan.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.types import BRANCHING, span_width
from mcjax.window.working_context import COLLAPSE, EXPAND, WorkingContext

_COST = BRANCHING - 1


class EditPlan(NamedTuple):
  """Edits in the order they were chosen.

  Attributes:
    action: [N] int32, EXPAND, COLLAPSE or 0 for none.
    entry: [N] int32 entry to expand, or first entry of the group to collapse.
  """

  action: np.ndarray
  entry: np.ndarray


class Legal(NamedTuple):
  """What may be edited, [W] each, padded with False.

  Attributes:
    expand: entry has children in the tree.
    collapse: entry starts 32 siblings that may be swapped for their parent.
  """

  expand: np.ndarray
  collapse: np.ndarray


def legal_edits(
  context: WorkingContext,
  *,
  step: int,
  cooldown: int,
  sink: int,
  protect: int,
) -> Legal:
  """Masks of legal edits under pinning, alignment and cooldown.

  Args:
    context: the window.
    step: current refocus step.
    cooldown: steps during which the opposite action is barred.
    sink: tokens from the start that stay at L0.
    protect: newest tokens that stay at L0.
  """
  e = context.entries
  count = len(e)
  start, width = e.start(), e.width()
  young = step - e.born <= cooldown
  expand = (e.level > 0) & ~(young & (e.action == COLLAPSE))
  barred = young & (e.action == EXPAND)
  barred |= start < sink
  barred |= start + width > context.cursor - protect
  collapse = context.sibling_groups()
  if count >= BRANCHING:
    total = np.concatenate([[0], np.cumsum(barred)])
    blocked = total[BRANCHING:] - total[:-BRANCHING]
    collapse[: len(blocked)] &= blocked == 0
  padded = np.zeros((2, context.window), bool)
  padded[0, :count] = expand
  padded[1, :count] = collapse
  return Legal(padded[0], padded[1])


@functools.partial(jax.jit, static_argnames="max_edits")
def allocate(
  scores: jax.Array,
  can_expand: jax.Array,
  can_collapse: jax.Array,
  free: jax.Array,
  need: jax.Array,
  threshold: jax.Array,
  max_edits: int,
) -> tuple[jax.Array, jax.Array]:
  """Chooses at most `max_edits` edits.

  Args:
    scores: [W] float32 signed focus score per entry.
    can_expand: [W] bool.
    can_collapse: [W] bool, at first entries of sibling groups.
    free: int32 free slots.
    need: int32 slots that must be free afterwards; while they are not, the
      lowest-scored group is collapsed whatever its score.
    threshold: float32 tau.
    max_edits: static N_diff.

  Returns:
    action [N] int32 and entry [N] int32, see `EditPlan`.
  """
  window = scores.shape[0]
  sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(scores)])
  ends = jnp.minimum(jnp.arange(window) + BRANCHING, window)
  group = (sums[ends] - sums[:-1]) / BRANCHING
  place = jnp.arange(window)

  def choose(i, carry):
    free, can_expand, can_collapse, actions, entries = carry
    up = jnp.where(can_expand, scores, -jnp.inf)
    down = jnp.where(can_collapse, group, jnp.inf)
    best, worst = jnp.argmax(up), jnp.argmin(down)
    wants = up[best] > threshold
    affordable = free - need >= _COST
    forced = (free < need) & (down[worst] < jnp.inf)
    do_expand = wants & affordable & ~forced
    do_collapse = forced | (~do_expand & (down[worst] < -threshold))
    action = jnp.where(
      do_expand, EXPAND, jnp.where(do_collapse, COLLAPSE, 0)
    ).astype(jnp.int32)
    at = jnp.where(do_expand, best, worst).astype(jnp.int32)
    inside = (place >= at) & (place < at + BRANCHING)
    covers = (place <= at) & (place > at - BRANCHING)
    overlaps = (place > at - BRANCHING) & (place < at + BRANCHING)
    can_expand = can_expand & ~jnp.where(
      do_expand, place == at, do_collapse & inside
    )
    can_collapse = can_collapse & ~jnp.where(
      do_expand, covers, do_collapse & overlaps
    )
    free = free - _COST * action
    return (free, can_expand, can_collapse, actions.at[i].set(action),
            entries.at[i].set(at))

  none = jnp.zeros(max_edits, jnp.int32)
  *_, actions, entries = jax.lax.fori_loop(
    0, max_edits, choose, (free, can_expand, can_collapse, none, none)
  )
  return actions, entries


def plan_edits(
  scores: np.ndarray,
  legal: Legal,
  *,
  free: int,
  need: int,
  threshold: float,
  max_edits: int,
) -> EditPlan:
  """`allocate` on host arrays; scores [E] are padded to the window."""
  padded = np.zeros(legal.expand.shape, np.float32)
  padded[: len(scores)] = scores
  action, entry = jax.device_get(allocate(
    padded, legal.expand, legal.collapse, np.int32(free), np.int32(need),
    np.float32(threshold), max_edits,
  ))
  return EditPlan(action, entry)


def apply_plan(
  context: WorkingContext, plan: EditPlan, step: int
) -> list[tuple[int, int, int]]:
  """Applies a plan to the bookkeeping, collapses first so expands can be paid.

  Returns:
    (action, level, index) of the node each edit swapped: the expanded node,
    or the parent that replaced its children.
  """
  e = context.entries
  edits = []
  for action, at in zip(plan.action.tolist(), plan.entry.tolist()):
    if action:
      up = 1 if action == COLLAPSE else 0
      index = int(e.index[at]) // (BRANCHING if up else 1)
      edits.append((action, int(e.level[at]) + up, index))
  for action, level, index in sorted(edits):
    start = index * span_width(level)
    at = int(np.searchsorted(context.entries.start(), start))
    if action == COLLAPSE:
      context.collapse(at, step)
    else:
      context.expand(at, step)
  return edits
