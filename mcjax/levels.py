"""The levels of a tree: token, gist and key columns, and how they grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from mcjax import keys as lexical
from mcjax import tree_format
from mcjax.columns import Column, flush_columns
from mcjax.store import Store
from mcjax.types import BRANCHING, McjaxError, span_width

SLICE_TOKENS = 2 * span_width(3)  # tokens per encoder batch of a long append


class Encoder(Protocol):
  """What the tree needs of a GistNet."""

  fingerprint: str
  d_model: int

  def encode_tokens(self, token_ids: np.ndarray) -> np.ndarray:
    """int32 [n, 32] -> float32 [n, D]."""

  def encode_gists(self, gists: np.ndarray, level: int) -> np.ndarray:
    """float32 [n, 32, D] of `level - 1` -> float32 [n, D] of `level`."""


class Levels:
  """Columns of every level, opened at a commit record.

  Attributes:
    cursor: tokens held, those in RAM included.
    tokens: the column of token ids.
    ingested: rows read to compute nodes.
  """

  def __init__(self, store: Store, record: dict):
    """Opens the columns and reads the last row of each. Raises: McjaxError."""
    self._store, self._record = store, record
    self.cursor = record["cursor"]
    self.ingested = 0
    spec = tree_format.tokens_spec(record["vocab_size"])
    self.tokens = Column(store, "tokens", spec, self.cursor)
    self._columns: dict[tuple[str, int], Column] = {}
    level = 1
    while self.num_nodes(level):
      for kind in ("gists", "keys") if level > 1 else ("gists",):
        length = self.num_nodes(level)
        column = self._make_column(kind, level, record, length)
        self._columns[kind, level] = column
        column.read(length - 1, length)  # a lost or cut file shows here
      level += 1

  def num_nodes(self, level: int) -> int:
    """Complete nodes of a level."""
    return self.cursor // span_width(level)

  def column(self, kind: str, level: int) -> Column:
    """The "gists" or "keys" of a level, made on first use."""
    if (kind, level) not in self._columns:
      column = self._make_column(kind, level, self._record, 0)
      self._columns[kind, level] = column
    return self._columns[kind, level]

  def _make_column(
    self, kind: str, level: int, record: dict, length: int
  ) -> Column:
    width, dtype = record["gistnet"]["d_model"], record["gist_dtype"]
    spec = tree_format.column_spec(kind, level, width, dtype)
    folder = f"gists/{record['gist_epoch']}" if kind == "gists" else kind
    return Column(self._store, f"{folder}/L{level}", spec, length)

  def blocks(self, start: int, stop: int) -> np.ndarray:
    """Token ids of blocks [start, stop): int32 [n, 32]."""
    ids = self.tokens.read(start * BRANCHING, stop * BRANCHING)
    return ids.astype(np.int32).reshape(-1, BRANCHING)

  def grow(self, ids: np.ndarray, encoder: Encoder) -> None:
    """Adds at most `SLICE_TOKENS` tokens and every node they complete."""
    old = self.cursor
    self.tokens.append(ids)
    self.cursor += len(ids)
    level = 1
    while (start := old // span_width(level)) < self.num_nodes(level):
      stop = self.num_nodes(level)
      rows = self._encode(encoder, level, start, stop, self.column)
      self.column("gists", level).append(rows)
      if level > 1:
        self.column("keys", level).append(self._new_keys(level, start, stop))
      level += 1

  def _encode(
    self,
    encoder: Encoder,
    level: int,
    start: int,
    stop: int,
    column: Callable[[str, int], Column],
  ) -> np.ndarray:
    """Stored gists of nodes [start, stop), from the level below."""
    n, width = stop - start, encoder.d_model
    self.ingested += n * BRANCHING
    if level == 1:
      gists = encoder.encode_tokens(self.blocks(start, stop))
    else:
      below = column("gists", level - 1)
      rows = below.read(start * BRANCHING, stop * BRANCHING)
      children = tree_format.unpack_gists(rows).reshape(n, BRANCHING, -1)
      gists = encoder.encode_gists(children, level)
    gists = np.asarray(gists, np.float32)
    if gists.shape != (n, width):
      raise ValueError(f"gists of shape {gists.shape}, not {(n, width)}")
    if not np.isfinite(gists).all():
      raise McjaxError(
        f"the GistNet {encoder.fingerprint} made a gist of level {level} that"
        " is not finite"
      )
    return tree_format.pack_gists(gists, self._record["gist_dtype"])

  def _new_keys(self, level: int, start: int, stop: int) -> np.ndarray:
    if lexical.key_dim(level) != lexical.key_dim(level - 1):
      self.ingested += (stop - start) * span_width(level)
      return self.sketch(level, start, stop)
    self.ingested += (stop - start) * BRANCHING
    below = self.column("keys", level - 1)
    rows = below.read(start * BRANCHING, stop * BRANCHING)
    return lexical.union(rows.reshape(stop - start, BRANCHING, -1))

  def sketch(self, level: int, start: int, stop: int) -> np.ndarray:
    """Keys of nodes [start, stop), from their tokens and the few before."""
    width = span_width(level)
    low = max(0, start * width - lexical.LOOKBACK)
    ids = self.tokens.read(low, stop * width).astype(np.int64)
    missing = lexical.LOOKBACK - (start * width - low)
    ids = np.concatenate([np.full(missing, -1), ids])
    spans = np.lib.stride_tricks.sliding_window_view(
      ids, lexical.LOOKBACK + width
    )[::width]
    return lexical.sketch(spans, level)

  @property
  def has_full_shard(self) -> bool:
    """Whether enough tokens are in RAM to write a shard."""
    spec = self.tokens.spec
    return self.tokens.length // spec.shard > self.tokens.flushed // spec.shard

  def flush(self, everything: bool) -> None:
    """Writes rows in RAM, or only complete shards. Raises: McjaxError."""
    columns = [self.tokens, *self._columns.values()]
    flush_columns(columns, self._store.url, everything=everything)

  def snapshot(self) -> tuple:
    """A state to `restore`; copies no rows."""
    columns = {key: c.snapshot() for key, c in self._columns.items()}
    return self.cursor, self.tokens.snapshot(), columns

  def restore(self, state: tuple) -> None:
    """Forgets every row since a snapshot."""
    self.cursor, tokens, columns = state
    self.tokens.restore(tokens)
    self._columns = {key: self._columns[key] for key in columns}
    for key, column in self._columns.items():
      column.restore(columns[key])

  def rebuild(self, encoder: Encoder, record: dict) -> None:
    """Writes every gist anew into the gist epoch of `record`.

    The columns in use do not change until `switch`.
    """
    new: dict[tuple[str, int], Column] = {}
    step = SLICE_TOKENS // BRANCHING
    level = 1
    while self.num_nodes(level):
      column = new["gists", level] = self._make_column(
        "gists", level, record, 0
      )
      for start in range(0, self.num_nodes(level), step):
        stop = min(start + step, self.num_nodes(level))
        rows = self._encode(encoder, level, start, stop, lambda *key: new[key])
        column.append(rows)
        flush_columns([column], self._store.url, everything=False)
      flush_columns([column], self._store.url, everything=True)
      level += 1
    self._rebuilt = new, record

  def switch(self) -> None:
    """Takes the gists of the last `rebuild` into use."""
    new, self._record = self._rebuilt
    self._columns.update(new)
