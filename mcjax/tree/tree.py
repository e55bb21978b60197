"""The MegaContext tree: the whole history as tokens, gists and keys, on disk.

A 32-ary tree over time. Level 0 holds the token ids; a node of level 1 is the
gist of 32 tokens, a node of level l + 1 the gist of 32 nodes of level l. Levels
appear as the history grows. Only complete nodes exist: a parent is computed in
the append that completes its 32 children, in one batch per level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import os

from absl import logging
import numpy as np

from mcjax.tree import commits
from mcjax.tree import format as tree_format
from mcjax.tree import lock as writer_lock
from mcjax.tree.columns import flush_columns
from mcjax.tree.learned_keys import Keyer
from mcjax.tree.levels import SLICE_TOKENS, Encoder
from mcjax.tree.store import Store, encode_record
from mcjax.tree.stored import StoredTree, joined
from mcjax.types import McjaxError, span_width

__all__ = ["Encoder", "Keyer", "MegaContextTree"]


class MegaContextTree(StoredTree):
  """An append-only history; one writer at a time, not thread-safe.

  The writer holds the tree exclusively from `create` or `open` to `close`.
  Readers (mode "r") come and go as they like: they see one commit, and a newer
  one after `refresh`.

  Attributes:
    journal: events beside the tokens, committed with them.
  """

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
    commits.check_unused(store)
    made, lock = store.make_folder(), None
    try:
      lock = writer_lock.acquire(store)
      generation = commits.check_unused(store)  # under the lock, once more
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
      commits.recover(store, lock, record)
      return cls(store, record, generation, encoder, keyer, lock)
    except BaseException:
      lock.release()
      raise

  @staticmethod
  def exists(url: str | os.PathLike[str]) -> bool:
    """Whether a tree (whole or damaged) lies at the url."""
    return commits.exists(Store(url))

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
    record["commit"] = self._record.get("commit", 0) + 1
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
    self.revision += 1

  # Maintenance.

  def rebuild_gists(self, encoder: Encoder,
                    progress: Callable[[int, int], None] | None = None
                    ) -> None:
    """Rewrites every gist with another GistNet, in bounded memory.

    The new gists are written beside the old ones and one commit switches over,
    so a crash leaves a tree that opens with the old GistNet or the new one.
    Lens keys may depend on gists: the tree's keyer makes them anew; without
    one they are dropped.

    Args:
      encoder: the GistNet the tree belongs to from then on.
      progress: called with nodes written and nodes in all.

    Raises:
      McjaxError: a failed write; the tree then keeps its gists.
    """
    self.commit()
    keyer = self._levels.keyer
    record = tree_format.with_lens(self._record, keyer)
    record["gist_epoch"] += 1
    record["gistnet"] = tree_format.gistnet_fields(encoder)
    record.pop("refined", None)
    self._rebuild(record, encoder, keyer, progress=progress)
    self._encoder = encoder

  def amend_gists(self, index: np.ndarray, gists: np.ndarray,
                  done: Sequence[tuple[int, int]]) -> None:
    """Replaces some L1 gists, atomically, as `rebuild_gists` replaces all.

    Gists above them and lens keys stay as they are.

    Args:
      index: [n] int blocks.
      gists: [n, D] float32 of the GistNet's kind.
      done: runs [start, stop) of blocks that count as `refined` from then on,
        replaced or not.

    Raises:
      McjaxError: a gist that is not finite, or a failed write; the tree then
        keeps its gists.
      IndexError: no such block.
    """
    index = np.asarray(index, np.int64)
    if len(index) and not 0 <= index.min() <= index.max() < self.num_nodes(1):
      raise IndexError(f"no blocks {index.min()}..{index.max()}")
    if not np.isfinite(gists).all():
      raise McjaxError("a gist that is to be stored is not finite")
    self.commit()
    record = dict(self._record)
    record["gist_epoch"] += 1
    record["refined"] = joined([*self.refined, *done])
    order = np.argsort(index)
    self._rebuild(record, None, self._levels.keyer,
                  {1: (index[order], np.asarray(gists, np.float32)[order])})

  def attach_keyer(self, keyer: Keyer | None) -> None:
    """As `open` with this keyer, for callers that choose it afterwards."""
    self._levels.keyer = keyer

  def rebuild_lens_keys(self, keyer: Keyer,
                        progress: Callable[[int, int], None] | None = None
                        ) -> None:
    """Writes the lens keys of every node anew, as `rebuild_gists` does gists.

    Args:
      keyer: makes them, and those of later appends.
      progress: called with nodes written and nodes in all.

    Raises:
      McjaxError: a failed write; the tree then keeps the keys it has.
    """
    self.commit()
    record = tree_format.with_lens(self._record, keyer)
    self._rebuild(record, None, keyer, progress=progress)

  def _rebuild(
    self, record: dict, encoder: Encoder | None, keyer: Keyer | None,
    amended: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
    progress: Callable[[int, int], None] | None = None,
  ) -> None:
    """Writes the epochs that `record` adds and switches to it."""
    before = self._record
    used = tree_format.epoch_folders(before)
    for folder in tree_format.past_folders(record) - used:
      self._store.delete(folder + "/")  # what a crash left behind
    try:
      self._levels.rebuild(record, encoder, keyer, amended, progress)
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
    self.revision += 1
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
    if self._lock is None or self._is_forked:
      return
    try:
      self._flush_access()
    finally:
      self._lock.release()

  def __enter__(self) -> MegaContextTree:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _read_checked(
  store: Store, base_fingerprint: str, base_name: str, encoder: Encoder | None
) -> tuple[dict, bytes]:
  """The commit record, for these models, and its generation."""
  record, generation = commits.read_commit(store)
  tree_format.check_record(
    record, store.url, base_fingerprint, base_name, encoder
  )
  return record, generation
