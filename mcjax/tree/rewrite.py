"""Columns written anew into new epochs: what is good copied, the rest made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np

from mcjax.tree import format as tree_format
from mcjax.tree.columns import Column, flush_columns
from mcjax.tree.commits import Head
from mcjax.tree.counts import TokenFrequency
from mcjax.tree.derive import NodeMaker
from mcjax.tree.format import Encoder, Place
from mcjax.tree.learned_keys import Keyer
from mcjax.tree.store import Store
from mcjax.types import BRANCHING, McjaxError

FILLER = 0  # the token that erased ones become
_FILES = 8  # shards worked on at a time
_BLOCKS = 2048  # counted at a time

Dirty = Callable[[Place, int, int], np.ndarray]


def open_column(store: Store, record: dict, place: Place) -> Column:
  """A column of a record. Raises: McjaxError if its array is gone."""
  return Column(
    store, place.path, place.spec, place.length, record.get("sums"),
    record.get("packed"))


class Rewrite:
  """Writes the columns of some kinds anew; no commit, nothing is deleted.

  Attributes:
    record: the record to be, without the checksums until `run`.
    column: the column of a kind and level: the new one, where there is one.
  """

  def __init__(self, head: Head, kinds: Collection[str],
               encoder: Encoder | None, keyer: Keyer | None):
    """Args: as the columns need them: `encoder` for gists, `keyer` for lens.

    Raises:
      McjaxError: a model is missing, or is not the tree's.
    """
    self._store, self._kinds = head.store, kinds
    _check_models(head, kinds, encoder, keyer)
    self.record = tree_format.next_epochs(head.record, kinds)
    used = tree_format.epoch_folders(head.record)
    for folder in tree_format.past_folders(self.record) - used:
      self._store.delete(folder + "/")  # what a crash left behind
    self._old = {
      (p.kind, p.level): open_column(self._store, head.record, p)
      for p in tree_format.places(head.record)}
    self._new: dict[tuple[str, int], Column] = {}
    dtype = head.record["gist_dtype"]
    self._maker = NodeMaker(self.column, dtype, encoder, keyer)

  def column(self, kind: str, level: int) -> Column:
    key = kind, level
    return self._new[key] if key in self._new else self._old[key]

  def run(self, dirty: Dirty) -> None:
    """Writes every column of the kinds, in bounded memory.

    Args:
      dirty: which of the rows [start, stop) of a place are made anew, bool
        [n]; tokens become `FILLER`.

    Raises:
      McjaxError: a failed write, or rows that are needed cannot be read.
    """
    sums = dict(tree_format.without_past(self.record)["sums"])
    for place in tree_format.places(self.record):
      if place.kind in self._kinds and place.kind != "journal":
        sums |= self._write(place, dirty).record_sums()
    self.record["sums"] = sums

  def _write(self, place: Place, dirty: Dirty) -> Column:
    key = place.kind, place.level
    made = Column(self._store, place.path, place.spec, 0, {})
    step = _FILES * place.spec.shard
    for start in range(0, place.length, step):
      stop = min(start + step, place.length)
      for low, high, bad in _runs(dirty(place, start, stop), start):
        if not bad:
          rows = self._old[key].read(low, high)
        elif place.level:
          rows = self._maker.rows(place.kind, place.level, low, high)
        else:
          rows = np.full(high - low, FILLER)
        made.append(rows)
      flush_columns([made], self._store.url, everything=False)
    flush_columns([made], self._store.url, everything=True)
    self._new[key] = made
    return made

  def write_journal(self, lines: bytes) -> None:
    """Takes other events. Raises: McjaxError. To be called after `run`."""
    path = tree_format.folder("journal", self.record)
    made = Column(self._store, path, tree_format.JOURNAL_SPEC, 0, {})
    made.append(np.frombuffer(lines, np.uint8))
    flush_columns([made], self._store.url, everything=True)
    self.record["journal"] = len(lines)
    self.record["sums"] |= made.record_sums()

  def recount(self) -> None:
    """Counts the tokens of all blocks again. Raises: McjaxError."""
    self.record["frequency"] = recount(
      self._store, self.record, self.column("tokens", 0))


def recount(store: Store, record: dict, tokens: Column) -> dict[str, int]:
  """Counts the tokens of all blocks, into the slot that is not in use.

  Returns:
    The "frequency" of the record to be.
  """
  blocks, slot = record["cursor"] // BRANCHING, record["frequency"]["slot"]
  counts = recounted(store, record["vocab_size"], tokens, blocks, slot)
  return counts.save(always=True)


def recounted(store: Store, vocab_size: int, tokens: Column, blocks: int,
              slot: int = 0) -> TokenFrequency:
  """The counts of the first `blocks` blocks of a column of tokens."""
  counts = TokenFrequency(store, vocab_size, slot, 0)
  for start in range(0, blocks, _BLOCKS):
    stop = min(start + _BLOCKS, blocks)
    ids = tokens.read(start * BRANCHING, stop * BRANCHING)
    counts.add(ids.astype(np.int32).reshape(-1, BRANCHING))
  return counts


def _check_models(head: Head, kinds: Collection[str], encoder: Encoder | None,
                  keyer: Keyer | None) -> None:
  url, lens = head.store.url, head.record.get("lens")
  if "gists" in kinds:
    if encoder is None:
      raise McjaxError(f"{url} needs its GistNet for this")
    tree_format.check_gistnet(head.record, url, encoder)
  if "lens" in kinds and lens is not None and (
      keyer is None or keyer.fingerprint != lens["fingerprint"]):
    raise McjaxError(
      f"{url} has lens keys of {lens['fingerprint']}: give that LensNet, or"
      " run tools/rekey first"
    )


def _runs(mask: np.ndarray, start: int) -> Iterator[tuple[int, int, bool]]:
  """(low, high, value) of stretches of equal values."""
  edges = np.flatnonzero(np.diff(mask)) + 1
  for low, high in zip([0, *edges], [*edges, len(mask)], strict=True):
    if low < high:
      yield start + int(low), start + int(high), bool(mask[low])
