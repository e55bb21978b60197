"""What the LM gets to read in a window's slots, fetched from the tree."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from mcjax.base.load import BaseLM
from mcjax.tree.tree import MegaContextTree
from mcjax.types import Array
from mcjax.window import kv_slots
from mcjax.window.undo import Undo
from mcjax.window.working_context import Entries, WorkingContext


class Nodes(Protocol):
  """Where the window's inputs come from: a tree, or a plain text."""

  def tokens(self, start: int, stop: int) -> np.ndarray:
    """Token ids [start, stop), int32 [n]."""

  def gists(self, level: int, start: int, stop: int) -> np.ndarray:
    """Gists [start, stop) of a level, float32 [n, D]."""


class Inputs(NamedTuple):
  """What the LM gets to read of n entries.

  Attributes:
    ids: [n] int32 tokens; of no meaning where a gist is read.
    gists: [n, D] float32; of no meaning where a token is read.
    is_gist: [n] bool.
  """

  ids: Array
  gists: Array
  is_gist: Array


class SlotInputs:
  """A window's bookkeeping, and what the LM gets to read in each slot.

  All of it lies on the host: a token is an id, and embedded when it is read.

  Attributes:
    lm: the base.
    window: the bookkeeping.
    ids: [S] int32, token of each slot.
    gists: [S, D] float32, gist of each slot.
    is_gist: [S] bool, which of both it is.
  """

  def __init__(self, lm: BaseLM, slots: int):
    self.lm, self._slots = lm, slots
    self.window = WorkingContext(slots)
    self.ids: np.ndarray = np.zeros(slots, np.int32)
    self.gists: np.ndarray = np.zeros((slots, lm.config.d_model), np.float32)
    self.is_gist: np.ndarray = np.zeros(slots, bool)
    self._undo = Undo(slots)

  def load(self, entries: Entries, tree: Nodes) -> None:
    """Fetches the inputs of `entries` from the tree into their slots."""
    if not len(entries):
      return
    cuts = np.flatnonzero(
      (np.diff(entries.level) != 0) | (np.diff(entries.index) != 1)
    )
    for run in np.split(np.arange(len(entries)), cuts + 1):
      level, first = int(entries.level[run[0]]), int(entries.index[run[0]])
      slots = entries.slot[run]
      if level == 0:
        self._load_tokens(slots, tree.tokens(first, first + len(run)))
      else:
        self._undo.written[slots] = self.is_gist[slots] = True
        self.gists[slots] = tree.gists(level, first, first + len(run))

  def load_unready(self, tree: Nodes) -> None:
    """Fetches the inputs of every entry that has no keys and values yet."""
    self.load(self._subset(np.flatnonzero(~self.window.entries.ready)), tree)

  def inputs_of(self, slots: np.ndarray) -> Inputs:
    """What is read in slots [n]."""
    return Inputs(self.ids[slots], self.gists[slots], self.is_gist[slots])

  def node_inputs(self, tree: MegaContextTree, level: int, first: int,
                  count: int) -> np.ndarray:
    """Input embeddings [count, D] float32 of nodes from `first` on."""
    if level:
      return tree.gists(level, first, first + count)
    return self.token_embeddings(tree.tokens(first, first + count))

  def token_embeddings(self, token_ids: np.ndarray) -> np.ndarray:
    """Input embeddings [n, D] float32 of token ids [n]."""
    return np.asarray(kv_slots.embed(self.lm.params, token_ids), np.float32)

  def _subset(self, rows: np.ndarray) -> Entries:
    return Entries(*(a[rows] for a in self.window.entries.arrays()))

  def _load_tokens(self, slots: np.ndarray, ids: np.ndarray) -> None:
    self._undo.written[slots], self.is_gist[slots] = True, False
    self.ids[slots] = ids

  def _permute_inputs(self, order: np.ndarray) -> None:
    self.ids, self.gists = self.ids[order], self.gists[order]
    self.is_gist = self.is_gist[order]
