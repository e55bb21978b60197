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

from absl import logging
from jaxtyping import Float32, Int8, Int32, UInt8, UInt32
import numpy as np

from mcjax.tree import format as tree_format
from mcjax.tree import lock as writer_lock
from mcjax.tree.columns import AccessCounts, TokenFrequency, flush_columns
from mcjax.tree.journal import Journal
from mcjax.tree.learned_keys import Keyer
from mcjax.tree.levels import SLICE_TOKENS, Encoder, Levels
from mcjax.tree.store import Store, decode_record, encode_record
from mcjax.types import BRANCHING, McjaxError, span_width

__all__ = ["Encoder", "Keyer", "MegaContextTree"]


class MegaContextTree:
  """An append-only history; one writer at a time, not thread-safe.

  The writer holds the tree exclusively from `create` or `open` to `close`.
  Readers (mode "r") come and go as they like: they see one commit, and a newer
  one after `refresh`.

  Attributes:
    journal: events beside the tokens, committed with them.
  """

  def __init__(
    self,
    store: Store,
    record: dict,
    generation: bytes,
    encoder: Encoder | None,
    keyer: Keyer | None,
    lock: writer_lock.WriterLock | None,
  ):
    """Use `create` or `open`."""
    self._store, self._encoder, self._lock = store, encoder, lock
    self._closed = False
    self._transient = 0
    kinds = ("tokens", "gists", "keys", "lens", "access")
    self._reads = dict.fromkeys(kinds, 0)
    self._load(record, generation, keyer)

  def _load(self, record: dict, generation: bytes, keyer: Keyer | None) -> None:
    """Takes up a commit."""
    store = self._store
    levels = Levels(store, record, keyer)
    frequency = TokenFrequency(
      store, record["vocab_size"], **record["frequency"]
    )
    journal = Journal(store, record.get("journal", 0), record.get("sums"))
    blocks = record["cursor"] // span_width(1)
    frequency.add(levels.blocks(frequency.blocks, blocks))
    self._levels, self._frequency = levels, frequency
    self.journal, self._access = journal, AccessCounts(store)
    self._record, self._generation = record, generation

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
    extra: dict | None = None,
    keyer: Keyer | None = None,
  ) -> MegaContextTree:
    """Makes an empty tree.

    Args:
      url: a path, file://, memory://, gs:// or s3:// folder, absent or empty.
      base_fingerprint: identity of the frozen LM whose embeddings gists are in.
      base_name: its name, for messages.
      encoder: the GistNet.
      vocab_size: token ids are below it.
      gist_dtype: "bfloat16", "float32", or "int8" with a scale per vector.
      extra: small JSON to keep with the tree, as for `commit`.
      keyer: makes the lens keys; None keeps none.

    Raises:
      McjaxError: something is there already, or it cannot be written; nothing
        is left behind.
    """
    record = tree_format.new_record(
      base_fingerprint, base_name, encoder, vocab_size, gist_dtype, keyer
    )
    record["extra"] = extra or record["extra"]
    store = Store(url)
    _check_unused(store)
    made, lock = store.make_folder(), None
    try:
      lock = writer_lock.acquire(store)
      generation = _check_unused(store)  # under the lock, once more
      store.remove_litter()
      generation = store.write_record(encode_record(record), generation)
    except BaseException:
      store.unmake(made, locked=lock is not None)
      if lock is not None:
        lock.release()
      raise
    return cls(store, record, generation, encoder, keyer, lock)

  @classmethod
  def open(
    cls,
    url: str | os.PathLike[str],
    *,
    base_fingerprint: str,
    base_name: str,
    encoder: Encoder | None,
    keyer: Keyer | None = None,
    mode: str = "a",
  ) -> MegaContextTree:
    """Opens a tree at its last commit.

    Args:
      url: as for `create`.
      base_fingerprint: must be the tree's.
      base_name: for messages.
      encoder: its fingerprint must be the tree's; None opens the tree of any
        GistNet, without `append`.
      keyer: goes on with the lens keys if it made those stored. Otherwise, and
        with None, the stored ones can be read until the first append, which
        drops them; `rebuild_lens_keys` makes new ones.

      mode: "a" to append, which one process at a time can; "r" to read, beside
        a writer and where nothing can be written. What a reader appends stays
        within `transient`.

    Raises:
      McjaxError: missing, damaged, of a newer format, made with another base
        LM or GistNet, or open for writing elsewhere.
    """
    if mode not in ("a", "r"):
      raise McjaxError(f'mode {mode!r} is not "a" (append) or "r" (read)')
    store = Store(url)
    models = base_fingerprint, base_name, encoder
    record, generation = _read_checked(store, *models)
    if mode == "r":
      return cls(store, record, generation, encoder, keyer, None)
    lock = writer_lock.acquire(store)
    try:
      record, generation = _read_checked(store, *models)
      _recover(store, lock, record)
      return cls(store, record, generation, encoder, keyer, lock)
    except BaseException:
      lock.release()
      raise

  @staticmethod
  def exists(url: str | os.PathLike[str]) -> bool:
    """Whether a tree (whole or damaged) lies at the url."""
    return Store(url).read_record()[0] is not None

  # Shape.

  @property
  def url(self) -> str:
    return self._store.url

  @property
  def read_only(self) -> bool:
    """Whether it was opened with mode "r"."""
    return self._lock is None

  @property
  def cursor(self) -> int:
    """Tokens in the history, uncommitted and transient ones included."""
    return self._levels.cursor

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
  def lens_fingerprint(self) -> str | None:
    """Identity of what made the lens keys held; None if there are none."""
    return self._levels.lens["fingerprint"] if self._levels.lens else None

  @property
  def extra(self) -> dict:
    """What the last commit stored beside the history."""
    return json.loads(json.dumps(self._record["extra"]))

  def num_nodes(self, level: int) -> int:
    """Complete nodes of a level; tokens at level 0."""
    return self.cursor // span_width(level)

  @property
  def top_level(self) -> int:
    """The highest level with a complete node; 0 if there is none."""
    level = 0
    while self.cursor >= span_width(level + 1):
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
    if not self._transient:
      self._check_writable()
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
        room = SLICE_TOKENS - self.cursor % SLICE_TOKENS
        first = self.num_nodes(1)
        self._levels.grow(ids[at : at + room], self._encoder)
        self._frequency.add(self._levels.blocks(first, self.num_nodes(1)))
        if self._levels.has_full_shard and not self.read_only:
          self._check_not_changed()
          self._levels.flush(everything=False)
        at += room
    except BaseException:
      self._restore(state)
      raise

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
    self._check_writable()
    self._check_not_changed()
    self._levels.begin_sums()
    self.journal.column.begin_sums()
    self._levels.flush(everything=True)
    flush_columns([self.journal.column], self.url, everything=True)
    record = dict(self._record, cursor=self.cursor, lens=self._levels.lens)
    record["version"] = tree_format.FORMAT_VERSION
    record["sums"] = self._levels.record_sums()
    record["sums"] |= self.journal.column.record_sums()
    record["journal"] = self.journal.column.length
    if extra is not None:
      try:
        record["extra"] = json.loads(json.dumps(extra))
      except (TypeError, ValueError) as error:
        raise McjaxError(f"commit extra is not JSON: {error}") from error
    record["frequency"] = self._frequency.save()
    before = self._record
    self._write_record(record)
    self._frequency.saved(record["frequency"])
    self._delete_unused(before)
    self._flush_access()

  def _flush_access(self) -> None:
    """Writes the access counts; they are statistics and may fail."""
    try:
      self._access.flush(lambda level: self.committed // span_width(level))
    except McjaxError as error:
      logging.log_first_n(logging.WARNING, "%s", 1, error)

  def _write_record(self, record: dict) -> None:
    raw = encode_record(record)
    try:
      generation = self._store.write_record(raw, self._generation)
    except BaseException as error:
      # An interrupt, or an answer that got lost, after it was written?
      with contextlib.suppress(McjaxError):
        found, generation = self._store.read_record()
        if found == raw:
          self._generation, self._record = generation, record
      if self._record is not record or not isinstance(error, McjaxError):
        raise
      return
    self._generation, self._record = generation, record

  def _delete_unused(self, before: dict) -> None:
    """Deletes the epochs that an older record names and this one does not."""
    epochs = tree_format.epoch_folders
    with contextlib.suppress(McjaxError):  # the next rebuild tries again
      for folder in epochs(before) - epochs(self._record):
        self._store.delete(folder + "/")

  def _check_writable(self) -> None:
    if self.read_only:
      raise McjaxError(f'{self.url} was opened with mode="r": cannot write')

  def _check_not_changed(self) -> None:
    assert self._lock is not None
    self._lock.check()
    if self._store.read_record()[1] != self._generation:
      raise McjaxError(
        f"another process wrote {self.url} meanwhile: close this tree and open"
        " it again"
      )

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

  def mark(self) -> tuple:
    """A state to go `back_to`; costs no copy of rows."""
    return self._record, self._snapshot()

  def back_to(self, mark: tuple) -> bool:
    """Forgets what was appended since `mark`.

    Returns:
      False, and no change, if there was a commit since.
    """
    record, state = mark
    if self._record is not record:
      return False
    self._restore(state)
    return True

  def _snapshot(self) -> tuple:
    parts = (self._levels, self._frequency, self._access, self.journal)
    return tuple(part.snapshot() for part in parts)

  def _restore(self, state: tuple) -> None:
    parts = (self._levels, self._frequency, self._access, self.journal)
    for part, part_state in zip(parts, state, strict=True):
      part.restore(part_state)

  # Reading.

  def tokens(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
    """Token ids [start, stop), int32 [n]. Raises: IndexError."""
    self._check_open()
    self._reads["tokens"] += max(0, stop - start)
    return self._levels.tokens.read(start, stop).astype(np.int32)

  def gists(self, level: int, start: int, stop: int
            ) -> Float32[np.ndarray, "n D"]:
    """Gists of nodes [start, stop) of a level >= 1, float32 [n, D]."""
    self._check_nodes(level, start, stop)
    self._reads["gists"] += stop - start
    return tree_format.unpack_gists(
      self._levels.column("gists", level).read(start, stop)
    )

  def keys(self, level: int, start: int, stop: int
           ) -> UInt8[np.ndarray, "n bytes"]:
    """Keys of nodes [start, stop) of a level >= 1, uint8 [n, key_dim(level)].

    Those of level 1 are not stored: they are made from the tokens.
    """
    self._check_nodes(level, start, stop)
    self._reads["keys"] += stop - start
    if level == 1:
      return self._levels.sketch(1, start, stop)
    return self._levels.column("keys", level).read(start, stop)

  def lens_keys(self, level: int, start: int, stop: int
                ) -> Int8[np.ndarray, "n bytes"]:
    """Lens keys of nodes [start, stop) of a level >= 1.

    Returns:
      int8 [n, K] at level 1; [n, 2K], minimum then maximum, above.

    Raises:
      McjaxError: the tree keeps no lens keys.
      IndexError: no such nodes.
    """
    self._check_nodes(level, start, stop)
    if self._levels.lens is None:
      raise McjaxError(f"{self.url} has no lens keys: tools/rekey writes them")
    self._reads["lens"] += stop - start
    return self._levels.column("lens", level).read(start, stop)

  @property
  def reads(self) -> dict[str, int]:
    """Rows read so far: per kind by the methods here, "ingest" by `append`."""
    return {**self._reads, "ingest": self._levels.ingested}

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
    if np.any(index >= self.cursor // width):
      raise IndexError("access to a node that is not complete")
    if not self.read_only:  # a reader could not write them ever
      self._access.add(level, index)

  def access_counts(self, level: int, start: int, stop: int
                    ) -> UInt32[np.ndarray, " n"]:
    """Access counts of nodes [start, stop) of a level >= 0: uint32 [n]."""
    self._check_nodes(level, start, stop, lowest=0)
    self._reads["access"] += stop - start
    return self._access.read(level, start, stop)

  def nbytes_on_disk(self) -> dict[str, int]:
    """Stored bytes per kind: tokens, gists, keys, lens, access, other."""
    kinds = ("tokens", "gists", "keys", "lens", "access", "other")
    total = dict.fromkeys(kinds, 0)
    for key, size in self._store.sizes().items():
      kind = key.split("/")[0]
      total[kind if kind in total else "other"] += size
    return total

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
    Lens keys may depend on gists: the tree's keyer makes them anew; without
    one they are dropped.

    Args:
      encoder: the GistNet the tree belongs to from then on.

    Raises:
      McjaxError: a failed write; the tree then keeps its gists.
    """
    self.commit()
    keyer = self._levels.keyer
    record = tree_format.with_lens(self._record, keyer)
    record["gist_epoch"] += 1
    record["gistnet"] = tree_format.gistnet_fields(encoder)
    self._rebuild(record, encoder, keyer)
    self._encoder = encoder

  def attach_keyer(self, keyer: Keyer | None) -> None:
    """As `open` with this keyer, for callers that choose it afterwards."""
    self._levels.keyer = keyer

  def rebuild_lens_keys(self, keyer: Keyer) -> None:
    """Writes the lens keys of every node anew, as `rebuild_gists` does gists.

    Args:
      keyer: makes them, and those of later appends.

    Raises:
      McjaxError: a failed write; the tree then keeps the keys it has.
    """
    self.commit()
    record = tree_format.with_lens(self._record, keyer)
    self._rebuild(record, None, keyer)

  def _rebuild(
    self, record: dict, encoder: Encoder | None, keyer: Keyer | None
  ) -> None:
    """Writes the epochs that `record` adds and switches to it."""
    before = self._record
    used = tree_format.epoch_folders(before)
    for folder in tree_format.past_folders(record) - used:
      self._store.delete(folder + "/")  # what a crash left behind
    try:
      self._levels.rebuild(record, encoder, keyer)
      record["sums"] = self._levels.record_sums(rebuilt=True)
      record["sums"] |= self.journal.column.record_sums()
      self._write_record(record)
    except BaseException:
      with contextlib.suppress(McjaxError):
        self._check_not_changed()  # else the new epochs are in use already
        for folder in tree_format.epoch_folders(record) - used:
          self._store.delete(folder + "/")
      raise
    self._levels.switch()
    self._delete_unused(before)

  def refresh(self) -> bool:
    """Goes on to the last commit; of readers.

    Returns:
      Whether there was a newer one.

    Raises:
      McjaxError: the tree is gone or damaged, or other models wrote it since;
        the tree is then as before the call.
    """
    self._check_open()
    if not self.read_only or self._transient:
      raise McjaxError(f"{self.url} is not a reader's to refresh")
    base = self._record["base"]
    record, generation = _read_checked(
      self._store, base["fingerprint"], base["name"], self._encoder
    )
    if generation == self._generation:
      return False
    self._load(record, generation, self._levels.keyer)
    return True

  def close(self) -> None:
    """Keeps the access counts; drops appends that were not committed."""
    if self._closed:
      return
    self._closed = True
    if self._lock is None:
      return
    try:
      self._flush_access()
    finally:
      self._lock.release()

  def __enter__(self) -> MegaContextTree:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _check_unused(store: Store) -> bytes:
  """The generation of the record that is not there. Raises: McjaxError."""
  raw, generation = store.read_record()
  if raw is not None:
    raise McjaxError(f"{store.url} already holds a tree: open it instead")
  if not store.is_unused():
    raise McjaxError(f"{store.url} is not empty: give a new or empty folder")
  return generation


def _read_checked(
  store: Store, base_fingerprint: str, base_name: str, encoder: Encoder | None
) -> tuple[dict, bytes]:
  """The commit record, for these models, and its generation."""
  raw, generation = store.read_record()
  if raw is None:
    raise McjaxError(f"there is no tree at {store.url}")
  record = decode_record(raw, store.url)
  tree_format.check_record(
    record, store.url, base_fingerprint, base_name, encoder
  )
  return record, generation


def _recover(
  store: Store, lock: writer_lock.WriterLock, record: dict
) -> None:
  """Clears up behind a writer that was killed, and says so."""
  if lock.crashed is None:
    return
  count = store.remove_litter()
  logging.warning(
    "%s was not closed by %s: going on from its last commit, %d tokens;"
    " %d files of unfinished writes removed",
    store.url, lock.crashed, record["cursor"], count,
  )
