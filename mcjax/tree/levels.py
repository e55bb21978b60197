"""The levels of a tree: columns of tokens, gists and keys; how they grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import itertools

import numpy as np

from mcjax.tree import format as tree_format
from mcjax.tree import learned_keys as lens_keys
from mcjax.tree.columns import Column, flush_columns
from mcjax.tree.derive import NodeMaker
from mcjax.tree.format import Encoder
from mcjax.tree.store import Store
from mcjax.types import BRANCHING, span_width

_RECENT = 256  # chunks of tokens in RAM: a focus reads around the same places
SLICE_TOKENS = 2 * span_width(3)  # tokens per encoder batch of a long append


class Levels:
  """Columns of every level, opened at a commit record.

  Attributes:
    cursor: tokens held, those in RAM included.
    tokens: the column of token ids.
    keyer: makes the lens keys of new nodes, where it made those held.
    ingested: rows read to compute nodes.
  """

  def __init__(self, store: Store, record: dict, keyer: lens_keys.Keyer | None):
    """Opens the columns and reads the last row of each. Raises: McjaxError."""
    self._store, self._record = store, record
    self.keyer = keyer
    self.cursor = record["cursor"]
    self.ingested = 0
    spec = tree_format.tokens_spec(record["vocab_size"])
    self._sums = record.get("sums")
    self.tokens = Column(
      store, tree_format.folder("tokens", record), spec, self.cursor,
      self._sums, record.get("packed"), recent=_RECENT)
    self._columns: dict[tuple[str, int], Column] = {}
    level = 1
    while self.num_nodes(level):
      for kind in tree_format.kinds_of(level, record):
        length = self.num_nodes(level)
        column = self._make_column(kind, level, record, length)
        self._columns[kind, level] = column
        column.read(length - 1, length)  # a lost or cut file shows here
      level += 1

  @property
  def lens(self) -> dict | None:
    """What the record will say of the lens keys held; None without any."""
    return self._record.get("lens")

  def num_nodes(self, level: int) -> int:
    """Complete nodes of a level."""
    return self.cursor // span_width(level)

  def column(self, kind: str, level: int) -> Column:
    """The "gists", "keys" or "lens" of a level, made on first use.

    The "tokens" of level 0, too.
    """
    if kind == "tokens":
      return self.tokens
    if (kind, level) not in self._columns:
      column = self._make_column(kind, level, self._record, 0)
      self._columns[kind, level] = column
    return self._columns[kind, level]

  def _make_column(
    self, kind: str, level: int, record: dict, length: int
  ) -> Column:
    spec = tree_format.column_spec(kind, level, record)
    path = f"{tree_format.folder(kind, record)}/L{level}"
    packed = record.get("packed")
    return Column(self._store, path, spec, length, self._sums, packed)

  def blocks(self, start: int, stop: int) -> np.ndarray:
    """Token ids of blocks [start, stop): int32 [n, 32]."""
    ids = self.tokens.read(start * BRANCHING, stop * BRANCHING)
    return ids.astype(np.int32).reshape(-1, BRANCHING)

  def grow(self, ids: np.ndarray, encoder: Encoder) -> None:
    """Adds at most `SLICE_TOKENS` tokens and every node they complete.

    Lens keys that the keyer cannot go on with are dropped.
    """
    if self.lens and not self._keyer_fits():
      self._record = tree_format.with_lens(self._record, None)
      self._drop_lens_columns()
    old = self.cursor
    self.tokens.append(ids)
    self.cursor += len(ids)
    maker = self._maker(encoder, self.column, self.keyer)
    level = 1
    while (start := old // span_width(level)) < self.num_nodes(level):
      for kind in tree_format.kinds_of(level, self._record):
        rows = maker.rows(kind, level, start, self.num_nodes(level))
        self.column(kind, level).append(rows)
      level += 1
    self.ingested += maker.read

  def _keyer_fits(self) -> bool:
    keyer, lens = self.keyer, self.lens
    if keyer is None or lens is None:
      return False
    made_by = lens["fingerprint"], lens["key_dim"]
    return (keyer.fingerprint, keyer.key_dim) == made_by

  def _without_lens(self) -> dict[tuple[str, int], Column]:
    return {k: c for k, c in self._columns.items() if k[0] != "lens"}

  def _drop_lens_columns(self) -> None:
    self._columns = self._without_lens()

  def sketch(self, level: int, start: int, stop: int) -> np.ndarray:
    """Keys of nodes [start, stop), from their tokens and the few before."""
    return self._maker(None, self.column).sketch(level, start, stop)

  def _maker(
    self, encoder: Encoder | None, column: Callable[[str, int], Column],
    keyer: lens_keys.Keyer | None = None,
  ) -> NodeMaker:
    dtype = self._record["gist_dtype"]
    return NodeMaker(column, dtype, encoder, keyer)

  @property
  def has_full_shard(self) -> bool:
    """Whether enough tokens are in RAM to write a shard."""
    spec = self.tokens.spec
    return self.tokens.length // spec.shard > self.tokens.flushed // spec.shard

  def flush(self, everything: bool) -> None:
    """Writes rows in RAM, or only complete shards. Raises: McjaxError."""
    columns = [self.tokens, *self._columns.values()]
    flush_columns(columns, self._store.url, everything=everything)

  def begin_sums(self) -> None:
    """Makes the checksums of a tree that has none; reads it once."""
    if self._sums is None:
      self._sums = {}
      for column in (self.tokens, *self._columns.values()):
        column.begin_sums()

  def record_sums(self, rebuilt: bool = False) -> dict[str, int]:
    """What the commit record says of the columns; valid when all is flushed.

    Args:
      rebuilt: of those that `switch` takes into use.
    """
    columns = dict(self._columns)
    if rebuilt:
      columns = self._without_lens() | self._rebuilt[0]
    out = self.tokens.record_sums()
    for column in columns.values():
      out |= column.record_sums()
    return out

  def snapshot(self) -> tuple:
    """A state to `restore`; copies no rows."""
    columns = {key: (c, c.snapshot()) for key, c in self._columns.items()}
    return (self.cursor, self._record, self.tokens.snapshot(), columns,
            self._sums)

  def restore(self, state: tuple) -> None:
    """Forgets every row since a snapshot."""
    self.cursor, self._record, tokens, columns, self._sums = state
    self.tokens.restore(tokens)
    self._columns = {key: column for key, (column, _) in columns.items()}
    for column, column_state in columns.values():
      column.restore(column_state)

  def rebuild(
    self,
    record: dict,
    encoder: Encoder | None,
    keyer: lens_keys.Keyer | None,
    amended: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
    progress: Callable[[int, int], None] | None = None,
  ) -> None:
    """Writes columns anew into the epochs of `record`, in bounded memory.

    The columns in use do not change until `switch`.

    Args:
      record: the record to be.
      encoder: makes the gists; None keeps those held.
      keyer: makes the lens keys; None makes none.
      amended: {level: (sorted indices [n], gists [n, D])} that replace those
        held; encoder and keyer then make nothing, and lens keys stay.
      progress: called with nodes written and nodes in all.
    """
    new: dict[tuple[str, int], Column] = {}

    def column(kind: str, level: int) -> Column:
      key = kind, level
      return new[key] if key in new else self.column(kind, level)

    maker = self._maker(encoder, column, keyer)
    step = SLICE_TOKENS // BRANCHING
    kinds = ["gists"] * (encoder is not None) + ["lens"] * (keyer is not None)
    if amended is not None:
      kinds = ["gists"]
      new |= {k: c for k, c in self._columns.items() if k[0] == "lens"}
    counts = list(itertools.takewhile(
      bool, map(self.num_nodes, itertools.count(1))))
    done, total = 0, sum(counts) * len(kinds)
    for kind in kinds:
      for level, count in enumerate(counts, 1):
        made = new[kind, level] = self._make_column(kind, level, record, 0)
        for start in range(0, count, step):
          stop = min(start + step, count)
          made.append(
            maker.rows(kind, level, start, stop) if amended is None
            else self._amended(level, start, stop, amended))
          flush_columns([made], self._store.url, everything=False)
          done += stop - start
          if progress is not None:
            progress(done, total)
        flush_columns([made], self._store.url, everything=True)
    self._rebuilt = new, record, keyer

  def _amended(
    self, level: int, start: int, stop: int,
    amended: Mapping[int, tuple[np.ndarray, np.ndarray]],
  ) -> np.ndarray:
    """Stored gists of nodes [start, stop), some of them replaced."""
    rows = self.column("gists", level).read(start, stop)
    index, gists = amended.get(level, (np.zeros(0, np.int64), rows[:0]))
    first, last = np.searchsorted(index, [start, stop])
    if last > first:
      rows[index[first:last] - start] = tree_format.pack_gists(
        gists[first:last], self._record["gist_dtype"])
    return rows

  def switch(self) -> None:
    """Takes what the last `rebuild` wrote into use."""
    new, self._record, self.keyer = self._rebuilt
    self._drop_lens_columns()
    self._columns.update(new)
