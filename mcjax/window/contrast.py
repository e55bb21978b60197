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
from mcjax.window.decoding import Decoder, Seen
from mcjax.window.slot_inputs import SlotInputs
from mcjax.window.working_context import FIRST, Attention, WorkingContext


class Contrast:
  """The bookkeeping of the second cache, a stream of the window's decoder."""

  def __init__(self, lm: BaseLM, slots: int):
    self._lm = lm
    self._held = np.full(slots, -1, np.int64)  # token whose keys a slot holds
    self._logits: jax.Array | None = None

  def clear(self) -> None:
    """Forgets all keys and values: other text is read, or none."""
    self._held[:] = -1

  def permute(self, order: np.ndarray, near: int) -> None:
    """Follows slots that change places; far ones may have no cache."""
    self._held = self._held[order]
    self._held[near:] = -1

  def sync(self, inputs: SlotInputs, decoder: Decoder, row: int) -> int:
    """Runs the LM on what is new of the prompt and the answer.

    Args:
      inputs: of a window that attends to less than all raw text.
      decoder: has the cache, in its row `row`.

    Returns:
      token-forwards of the base, padding excluded.
    """
    seen = _without(inputs.window)
    rows = np.flatnonzero((seen.entries.level == 0) & ~seen.hidden())
    slots, tokens = seen.entries.slot[rows], seen.entries.index[rows]
    todo = self._held[slots] != tokens
    todo[-1:] = True  # what follows the newest is asked for
    slots, tokens = slots[todo], tokens[todo]
    largest = decoder.sizes[-1]
    for a in range(0, len(slots), largest):
      part = slots[a : a + largest]
      self._held[part] = tokens[a : a + largest]
      hidden = decoder.splice(
        self._lm.params, 1, row, part, inputs.inputs_of(part),
        self._arrays(seen))
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
    assert self._logits is not None
    seen = _without(window)
    first = seen.next_position(0, self._lm.config.max_positions)
    return Seen(*self._arrays(seen), first, self._logits)

  def take(self, logits: jax.Array, slots: np.ndarray, tokens: np.ndarray
           ) -> None:
    """Notes what a decoder made, for tokens [n] now in slots [n]."""
    self._logits = logits
    self._held[slots] = tokens


def _without(window: WorkingContext) -> WorkingContext:
  """The window as it would be if nothing before the prompt were read."""
  assert window.attention is not None
  seen = window.copy()
  seen.attention = Attention((FIRST,), window.attention.start)
  return seen
