"""The MegaContext tree: the whole history as tokens, gists and keys, on disk.

A 32-ary tree over time. Level 0 holds the token ids; a node of level 1 is the
gist of 32 tokens, a node of level l + 1 the gist of 32 nodes of level l. Levels
appear as the history grows. Only complete nodes exist: a parent is computed in
the append that completes its 32 children, in one batch per level.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
from typing import Protocol

import numpy as np

from mcjax import keys as lexical
from mcjax import tree_format
from mcjax.columns import AccessCounts, Column, TokenFrequency, flush_columns
from mcjax.store import Store, decode_record, encode_record
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


class MegaContextTree:
  """An append-only history; one writer at a time, not thread-safe.

  Attributes:
    reads: rows read so far, per kind: "tokens", "gists", "keys" and "access"
      through the methods below, "ingest" by `append` itself.
  """

  def __init__(
    self,
    store: Store,
    record: dict,
    generation: bytes,
    encoder: Encoder | None,
  ):
    """Use `create` or `open`."""
    self._store, self._generation = store, generation
    self._record, self._encoder = record, encoder
    self._cursor = record["cursor"]
    self._closed = False
    self._transient = 0
    self.reads = dict.fromkeys(("tokens", "gists", "keys", "access"), 0)
    self.reads["ingest"] = 0
    spec = tree_format.tokens_spec(record["vocab_size"])
    self._tokens = Column(store, "tokens", spec, self._cursor)
    self._columns: dict[tuple[str, int], Column] = {}
    for level in range(1, self.top_level + 1):
      for kind in ("gists", "keys") if level > 1 else ("gists",):
        length = self.num_nodes(level)
        column = self._make_column(kind, level, record, length)
        self._columns[kind, level] = column
        column.read(length - 1, length)  # a lost or cut file shows here
    self._access = AccessCounts(store)
    slot, counted = record["frequency"]["slot"], record["frequency"]["blocks"]
    self._frequency = TokenFrequency(store, self.vocab_size, slot, counted)
    recent = self._tokens.read(
      counted * BRANCHING, self.num_nodes(1) * BRANCHING
    )
    self._frequency.add(recent.reshape(-1, BRANCHING))

  @classmethod
  def create(
    cls,
    url: str | os.PathLike[str],
    *,
    base_fingerprint: str,
    base_name: str,
    encoder: Encoder,
    vocab_size: int,
    gist_dtype: str = "bfloat16",
  ) -> MegaContextTree:
    """Makes an empty tree.

    Args:
      url: a path, file://, memory://, gs:// or s3:// folder, absent or empty.
      base_fingerprint: identity of the frozen LM whose embeddings gists are in.
      base_name: its name, for messages.
      encoder: the GistNet.
      vocab_size: token ids are below it.
      gist_dtype: "bfloat16", "float32", or "int8" with a scale per vector.

    Raises:
      McjaxError: something is there already, or it cannot be written; nothing
        is left behind.
    """
    record = tree_format.new_record(
      base_fingerprint, base_name, encoder, vocab_size, gist_dtype
    )
    store = Store(url)
    raw, generation = store.read_record()
    if raw is not None:
      raise McjaxError(f"{store.url} already holds a tree: open it instead")
    if not store.is_empty():
      raise McjaxError(f"{store.url} is not empty: give a new or empty folder")
    with store.removed_on_error():
      generation = store.write_record(encode_record(record), generation)
    return cls(store, record, generation, encoder)

  @classmethod
  def open(
    cls,
    url: str | os.PathLike[str],
    *,
    base_fingerprint: str,
    base_name: str,
    encoder: Encoder | None,
  ) -> MegaContextTree:
    """Opens a tree at its last commit.

    Args:
      url: as for `create`.
      base_fingerprint: must be the tree's.
      base_name: for messages.
      encoder: its fingerprint must be the tree's; None opens the tree of any
        GistNet, without `append`.

    Raises:
      McjaxError: missing, damaged, of a newer format, or made with another base
        LM or GistNet.
    """
    store = Store(url)
    raw, generation = store.read_record()
    if raw is None:
      raise McjaxError(f"there is no tree at {store.url}")
    record = decode_record(raw, store.url)
    tree_format.check_record(
      record, store.url, base_fingerprint, base_name, encoder
    )
    return cls(store, record, generation, encoder)

  @staticmethod
  def exists(url: str | os.PathLike[str]) -> bool:
    """Whether a tree (whole or damaged) lies at the url."""
    return Store(url).read_record()[0] is not None

  # Shape.

  @property
  def url(self) -> str:
    return self._store.url

  @property
  def cursor(self) -> int:
    """Tokens in the history, uncommitted and transient ones included."""
    return self._cursor

  @property
  def committed(self) -> int:
    """Tokens in the last commit."""
    return self._record["cursor"]

  @property
  def d_model(self) -> int:
    return self._record["gistnet"]["d_model"]

  @property
  def vocab_size(self) -> int:
    return self._record["vocab_size"]

  @property
  def extra(self) -> dict:
    """What the last commit stored beside the history."""
    return json.loads(json.dumps(self._record["extra"]))

  def num_nodes(self, level: int) -> int:
    """Complete nodes of a level; tokens at level 0."""
    return self._cursor // span_width(level)

  @property
  def top_level(self) -> int:
    """The highest level with a complete node; 0 if there is none."""
    level = 0
    while self._cursor >= span_width(level + 1):
      level += 1
    return level

  # Writing.

  def append(self, token_ids: np.ndarray) -> None:
    """Adds tokens and every node they complete, readable at once.

    One encoder call per level and 65,536 tokens. Durable only after `commit`.

    Args:
      token_ids: int [n], any n.

    Raises:
      McjaxError: an id outside the vocabulary, a gist that is not finite, or a
        failed write; the tree is then as before the call.
    """
    self._check_open()
    ids = np.asarray(token_ids)
    if ids.size == 0:
      return
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
      raise McjaxError(
        f"token ids are {ids.dtype}{list(ids.shape)}, not int [n]"
      )
    if ids.min() < 0 or ids.max() >= self.vocab_size:
      raise McjaxError(
        f"token ids {ids.min()}..{ids.max()} leave the vocabulary of"
        f" {self.vocab_size}"
      )
    if self._encoder is None:
      raise McjaxError(
        f"{self.url} was opened without a GistNet: cannot append"
      )
    state = self._snapshot()
    try:
      at = 0
      while at < len(ids):
        room = SLICE_TOKENS - self._cursor % SLICE_TOKENS
        self._append_slice(ids[at : at + room])
        at += room
    except BaseException:
      self._restore(state)
      raise

  def _append_slice(self, ids: np.ndarray) -> None:
    old = self._cursor
    self._tokens.append(ids)
    self._cursor += len(ids)
    level = 1
    while self.num_nodes(level) > old // span_width(level):
      self._add_nodes(level, old // span_width(level), self.num_nodes(level))
      level += 1
    if self._tokens.length - self._tokens.flushed >= self._tokens.spec.shard:
      self._flush(everything=False)

  def _add_nodes(self, level: int, start: int, stop: int) -> None:
    if level == 1:
      blocks = self._tokens.read(start * BRANCHING, stop * BRANCHING)
      blocks = blocks.astype(np.int32).reshape(-1, BRANCHING)
      self._frequency.add(blocks)
    gists = self._encode(self._encoder, level, start, stop, self._column)
    self._column("gists", level).append(gists)
    if level > 1:
      self._column("keys", level).append(self._make_keys(level, start, stop))

  def _encode(self, encoder, level, start, stop, column) -> np.ndarray:
    """Stored rows of nodes [start, stop), from the level below."""
    low, high = start * BRANCHING, stop * BRANCHING
    self.reads["ingest"] += high - low
    n, width = stop - start, encoder.d_model
    if level == 1:
      blocks = self._tokens.read(low, high).astype(np.int32)
      gists = encoder.encode_tokens(blocks.reshape(n, BRANCHING))
    else:
      rows = column("gists", level - 1).read(low, high)
      children = tree_format.unpack_gists(rows).reshape(n, BRANCHING, width)
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

  def _make_keys(self, level: int, start: int, stop: int) -> np.ndarray:
    if lexical.key_dim(level) == lexical.key_dim(level - 1):
      low, high = start * BRANCHING, stop * BRANCHING
      self.reads["ingest"] += high - low
      rows = self._column("keys", level - 1).read(low, high)
      return lexical.union(rows.reshape(stop - start, BRANCHING, -1))
    self.reads["ingest"] += (stop - start) * span_width(level)
    return self._sketch(level, start, stop)

  def _sketch(self, level: int, start: int, stop: int) -> np.ndarray:
    """Keys from the tokens below and the few before them."""
    width = span_width(level)
    low = max(0, start * width - lexical.LOOKBACK)
    ids = self._tokens.read(low, stop * width).astype(np.int64)
    padding = lexical.LOOKBACK - (start * width - low)
    ids = np.concatenate([np.full(padding, -1), ids])
    spans = np.lib.stride_tricks.sliding_window_view(
      ids, lexical.LOOKBACK + width
    )[::width]
    return lexical.sketch(spans, level)

  def commit(self, extra: dict | None = None) -> None:
    """Makes every append so far durable, atomically.

    Args:
      extra: small JSON to keep with the commit; None keeps the last one.

    Raises:
      McjaxError: inside `transient`, a failed write (the stored tree is then
        still the last commit), or another process committed meanwhile.
    """
    self._check_open()
    if self._transient:
      raise McjaxError("a transient append cannot be committed")
    self._flush(everything=True)
    record = dict(self._record, cursor=self._cursor)
    if extra is not None:
      try:
        record["extra"] = json.loads(json.dumps(extra))
      except (TypeError, ValueError) as error:
        raise McjaxError(f"commit extra is not JSON: {error}") from error
    record["frequency"] = self._frequency.save()
    self._write_record(record)
    self._frequency.saved(record["frequency"])
    self._access.flush(self.num_nodes)

  def _write_record(self, record: dict) -> None:
    self._generation = self._store.write_record(
      encode_record(record), self._generation
    )
    self._record = record

  def _flush(self, everything: bool) -> None:
    if self._store.read_record()[1] != self._generation:
      raise McjaxError(
        f"another process wrote {self.url} meanwhile: close this tree and open"
        " it again"
      )
    columns = [self._tokens, *self._columns.values()]
    flush_columns(columns, self.url, everything=everything)

  @contextlib.contextmanager
  def transient(self) -> Iterator[None]:
    """Appends inside the context are undone when it ends."""
    state = self._snapshot()
    self._transient += 1
    try:
      yield
    finally:
      self._transient -= 1
      self._restore(state)

  def _snapshot(self) -> tuple:
    columns = {key: c.snapshot() for key, c in self._columns.items()}
    return (
      self._cursor,
      self._tokens.snapshot(),
      columns,
      self._frequency.snapshot(),
      self._access.snapshot(),
    )

  def _restore(self, state: tuple) -> None:
    self._cursor, tokens, columns, frequency, access = state
    self._frequency.restore(frequency)
    self._tokens.restore(tokens)
    self._columns = {key: self._columns[key] for key in columns}
    for key, column in self._columns.items():
      column.restore(columns[key])
    self._access.restore(access)

  # Reading.

  def tokens(self, start: int, stop: int) -> np.ndarray:
    """Token ids [start, stop), int32 (uint32 ids keep their low 31 bits)."""
    self._check_open()
    self.reads["tokens"] += max(0, stop - start)
    return self._tokens.read(start, stop).astype(np.int32)

  def gists(self, level: int, start: int, stop: int) -> np.ndarray:
    """Gists of nodes [start, stop) of a level >= 1, float32 [n, D]."""
    self._check_nodes(level, start, stop)
    self.reads["gists"] += stop - start
    return tree_format.unpack_gists(
      self._column("gists", level).read(start, stop)
    )

  def keys(self, level: int, start: int, stop: int) -> np.ndarray:
    """Keys of nodes [start, stop) of a level >= 1, uint8 [n, key_dim(level)].

    Those of level 1 are not stored: they are made from the tokens.
    """
    self._check_nodes(level, start, stop)
    self.reads["keys"] += stop - start
    if level == 1:
      return self._sketch(1, start, stop)
    return self._column("keys", level).read(start, stop)

  def block_frequency(self, token_ids: np.ndarray) -> np.ndarray:
    """How many complete blocks hold each token: int64 [n]."""
    return self._frequency.counts[np.asarray(token_ids)].astype(np.int64)

  # Access counts.

  def record_access(self, level: np.ndarray, index: np.ndarray) -> None:
    """Adds 1 to the access count of each node (level, index)."""
    level, index = np.broadcast_arrays(level, index)
    width = np.int64(BRANCHING) ** level.astype(np.int64)
    if np.any(level < 0) or np.any(index < 0):
      raise IndexError("negative level or index")
    if np.any(index >= self._cursor // width):
      raise IndexError("access to a node that is not complete")
    self._access.add(level, index)

  def access_counts(self, level: int, start: int, stop: int) -> np.ndarray:
    """Access counts of nodes [start, stop) of a level >= 0: uint32 [n]."""
    self._check_nodes(level, start, stop, lowest=0)
    self.reads["access"] += stop - start
    return self._access.read(level, start, stop)

  def nbytes_on_disk(self) -> dict[str, int]:
    """Stored bytes per kind: tokens, gists, keys, access, other."""
    total = dict.fromkeys(("tokens", "gists", "keys", "access", "other"), 0)
    for key, size in self._store.sizes().items():
      kind = key.split("/")[0]
      total[kind if kind in total else "other"] += size
    return total

  def _make_column(self, kind, level, record, length) -> Column:
    width, dtype = record["gistnet"]["d_model"], record["gist_dtype"]
    spec = tree_format.column_spec(kind, level, width, dtype)
    folder = f"gists/{record['gist_epoch']}" if kind == "gists" else kind
    return Column(self._store, f"{folder}/L{level}", spec, length)

  def _column(self, kind: str, level: int) -> Column:
    if (kind, level) not in self._columns:
      column = self._make_column(kind, level, self._record, 0)
      self._columns[kind, level] = column
    return self._columns[kind, level]

  def _check_open(self) -> None:
    if self._closed:
      raise McjaxError(f"the tree at {self.url} is closed")

  def _check_nodes(self, level, start, stop, lowest=1) -> None:
    self._check_open()
    if level < lowest or not 0 <= start <= stop <= self.num_nodes(level):
      raise IndexError(f"no nodes {start}:{stop} at level {level}")

  # Maintenance.

  def rebuild_gists(self, encoder: Encoder) -> None:
    """Rewrites every gist with another GistNet, in bounded memory.

    The new gists are written beside the old ones and one commit switches over,
    so a crash leaves a tree that opens with the old GistNet or the new one.

    Args:
      encoder: the GistNet the tree belongs to from then on.

    Raises:
      McjaxError: a failed write; the tree then keeps its gists.
    """
    self.commit()
    current = self._record["gist_epoch"]
    for epoch in range(current + 2):  # also what a crash left behind
      if epoch != current:
        self._store.delete(f"gists/{epoch}/")
    record = dict(self._record, gist_epoch=current + 1)
    record["gistnet"] = tree_format.gistnet_fields(encoder)
    new: dict[tuple[str, int], Column] = {}
    try:
      for level in range(1, self.top_level + 1):
        column = self._make_column("gists", level, record, 0)
        new["gists", level] = column
        step = max(1, SLICE_TOKENS // BRANCHING)
        for start in range(0, self.num_nodes(level), step):
          stop = min(start + step, self.num_nodes(level))
          column.append(
            self._encode(encoder, level, start, stop, lambda *key: new[key])
          )
          flush_columns([column], self.url, everything=False)
        flush_columns([column], self.url, everything=True)
      self._write_record(record)
    except BaseException:
      with contextlib.suppress(McjaxError):
        self._store.delete(f"gists/{current + 1}/")
      raise
    self._columns.update(new)
    self._encoder = encoder
    self._store.delete(f"gists/{current}/")

  def close(self) -> None:
    """Keeps the access counts; drops appends that were not committed."""
    if not self._closed:
      self._closed = True
      self._access.flush(lambda level: self.committed // span_width(level))
