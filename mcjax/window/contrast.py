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
from mcjax.types import BRANCHING
from mcjax.window import kv_slots
from mcjax.window.decoding import Decoder, Seen
from mcjax.window.row_cache import prior_slots
from mcjax.window.slot_inputs import SlotInputs
from mcjax.window.working_context import FIRST, Attention, WorkingContext


class Contrast:
  """The bookkeeping of the second cache, a stream of the window's decoder.

  It has few slots of its own: the history's first token, and of prompt and
  answer the newest as far as they fit.
  """

  def __init__(self, lm: BaseLM, window: int):
    """Args: window: slots of the window."""
    self._lm = lm
    self._held = np.full(prior_slots(window), -1, np.int64)  # token by slot
    self._logits: jax.Array | None = None

  def clear(self) -> None:
    """Forgets all keys and values: other text is read, or none."""
    self._held[:] = -1

  def sync(self, inputs: SlotInputs, decoder: Decoder, row: int) -> int:
    """Runs the LM on what is new of the prompt and the answer.

    Args:
      inputs: of a window that attends to less than all raw text.
      decoder: has the cache, in its row `row`.

    Returns:
      token-forwards of the base, padding excluded.
    """
    entries = inputs.window.entries
    rows = self._read(inputs.window)
    tokens = entries.index[rows]
    todo = ~np.isin(tokens, self._held)
    todo[-1:] = True  # what follows the newest is asked for
    slots, seen = self._placed(tokens), self._arrays(tokens)
    todo = np.flatnonzero(todo)
    largest = decoder.sizes[-1]
    for a in range(0, len(todo), largest):
      part = todo[a : a + largest]
      hidden = decoder.splice(
        1, row, slots[part],
        inputs.inputs_of(entries.slot[rows[part]]), seen)
      self._logits = kv_slots.next_logits(
        self._lm.params, hidden, np.int32(len(part) - 1))
    return len(todo)

  def _read(self, window: WorkingContext) -> np.ndarray:
    """Rows of the entries that are read, in the order of time."""
    assert window.attention is not None
    hidden = window.hidden(Attention((FIRST,), window.attention.start))
    rows = np.flatnonzero((window.entries.level == 0) & ~hidden)
    room = len(self._held) - BRANCHING  # beside the next block
    return rows if len(rows) <= room else np.r_[rows[:1], rows[1 - room :]]

  def _placed(self, tokens: np.ndarray) -> np.ndarray:
    """Slots [n] of tokens [n]; what is not among these gives up its own."""
    self._held[~np.isin(self._held, tokens)] = -1
    new = tokens[~np.isin(tokens, self._held)]
    self._held[self._free()[: len(new)]] = new
    order = np.argsort(self._held)
    return order[np.searchsorted(self._held, tokens, sorter=order)]

  def _free(self) -> np.ndarray:
    return np.flatnonzero(self._held < 0)

  def _arrays(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and visibility, by slot, of tokens that stand in a row."""
    slots = self._placed(tokens)
    positions = np.zeros(len(self._held), np.int32)
    visible = np.zeros(len(self._held), bool)
    positions[slots], visible[slots] = np.arange(len(tokens)), True
    return positions, visible

  def prior(self, window: WorkingContext, limit: int) -> Seen:
    """What a decoder reads for so many tokens; valid after `sync`."""
    assert self._logits is not None
    tokens = window.entries.index[self._read(window)]
    seen = self._arrays(tokens)
    slots = self._free()[:limit].astype(np.int32)
    return Seen(*seen, len(tokens), self._logits, slots)

  def take(self, logits: jax.Array, slots: np.ndarray, tokens: np.ndarray
           ) -> None:
    """Notes what a decoder made, for tokens [n] now in slots [n]."""
    self._logits = logits
    self._held[slots] = tokens
