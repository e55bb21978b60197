"""Context-aware decoding: what the LM would say without the text it reads.

A small model often repeats what it has heard before instead of what it was just
shown. So a second cache holds the prompt and the answer alone, and tokens are
weighed up that are likelier beside the text than without it (Shi et al. 2023,
arXiv:2305.14739), among those that are likely beside it (the plausibility
constraint of Li et al. 2022, arXiv:2210.15097).
"""

from __future__ import annotations

import jax
import numpy as np

from mcjax.base.load import BaseLM
from mcjax.window import kv_slots
from mcjax.window.decoding import Seen
from mcjax.window.working_context import FIRST, Attention, WorkingContext


class Contrast:
  """The second cache, in the window's slots; made when it is first needed."""

  def __init__(self, lm: BaseLM, slots: int, sizes: tuple[int, ...]):
    self._lm, self._sizes = lm, sizes
    self._state: kv_slots.KVSlots | None = None
    self._held = np.full(slots, -1, np.int64)  # token whose keys a slot holds
    self._logits: jax.Array | None = None

  def reset(self) -> None:
    """As `clear`, where the cache itself may be lost."""
    self._state = None
    self.clear()

  def clear(self) -> None:
    """Forgets all keys and values: other text is read, or none."""
    self._held[:] = -1

  def sync(self, window: WorkingContext, inputs) -> int:
    """Runs the LM on what is new of the prompt and the answer.

    Args:
      window: it attends to less than all raw text.
      inputs: [S, D] of its slots.

    Returns:
      token-forwards of the base, padding excluded.
    """
    seen, self._fresh = _without(window), True
    rows = np.flatnonzero((seen.entries.level == 0) & ~seen.hidden())
    slots, tokens = seen.entries.slot[rows], seen.entries.index[rows]
    todo = self._held[slots] != tokens
    todo[-1:] = True  # what follows the newest is asked for
    slots, tokens = slots[todo], tokens[todo]
    if self._state is None:
      self._state = kv_slots.init(
        self._lm.config, len(self._held), inputs.dtype)
    self._state = self._state._replace(inputs=inputs.copy())
    largest = self._sizes[-1]
    for a in range(0, len(slots), largest):
      part = slots[a : a + largest]
      size = next(s for s in self._sizes if s >= len(part))
      self._held[part] = tokens[a : a + largest]
      positions, visible = self._arrays(seen)
      self._state, hidden = kv_slots.splice(
        self._lm.params, self._lm.config, self._state,
        kv_slots.pad(part, size, len(self._held)), positions, visible,
        np.zeros(size, bool))
      self._logits = kv_slots.next_logits(
        self._lm.params, hidden, np.int32(len(part) - 1))
    return len(slots)

  def _arrays(self, seen: WorkingContext) -> tuple[np.ndarray, np.ndarray]:
    positions, visible = seen.slot_arrays(
      0, self._lm.config.max_positions, show_gists=False)
    held = np.zeros(len(visible), bool)
    e = seen.entries
    held[e.slot] = self._held[e.slot] == e.index
    return positions, visible & held

  def prior(self, window: WorkingContext) -> Seen:
    """What a decoder reads; valid after `sync`."""
    assert self._state is not None and self._logits is not None
    seen = _without(window)
    first = seen.next_position(0, self._lm.config.max_positions)
    return Seen(self._state, *self._arrays(seen), first, self._logits,
                self._fresh)

  def take(self, made: tuple[kv_slots.KVSlots, jax.Array], slots: np.ndarray,
           tokens: np.ndarray) -> None:
    """Takes over what a decoder made, for tokens [n] now in slots [n]."""
    self._state, self._logits = made
    self._held[slots] = tokens
    self._fresh = False


def _without(window: WorkingContext) -> WorkingContext:
  """The window as it would be if nothing before the prompt were read."""
  assert window.attention is not None
  seen = window.copy()
  seen.attention = Attention((FIRST,), window.attention.start)
  return seen
