"""What a stored tree holds: its shape, its rows, how often they were used."""

from __future__ import annotations

from collections.abc import Iterable
import json
import os

from jaxtyping import Float32, Int8, Int32, UInt8, UInt32
import numpy as np

from mcjax.tree import format as tree_format
from mcjax.tree import lock as writer_lock
from mcjax.tree.counts import AccessCounts, TokenFrequency
from mcjax.tree.journal import Journal
from mcjax.tree.learned_keys import Keyer
from mcjax.tree.levels import Encoder, Levels
from mcjax.tree.store import Store
from mcjax.types import BRANCHING, McjaxError, span_width


class StoredTree:
  """A tree at one commit, with what was appended since.

  Attributes:
    journal: events beside the tokens, committed with them.
    revision: grows when rows are taken back or written anew, not when the tree
      grows: what was read at another one may be no longer so.
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
    self._closed, self._process = False, os.getpid()
    self._transient = self.revision = 0
    kinds = ("tokens", "gists", "keys", "lens", "access")
    self._reads = dict.fromkeys(kinds, 0)
    self._load(record, generation, keyer)

  def _load(self, record: dict, generation: bytes, keyer: Keyer | None) -> None:
    """Takes up a commit."""
    self.revision += 1
    store = self._store
    levels = Levels(store, record, keyer)
    frequency = TokenFrequency(
      store, record["vocab_size"], **record["frequency"]
    )
    journal = Journal(
      store, record.get("journal", 0), record.get("sums"),
      tree_format.folder("journal", record))
    blocks = record["cursor"] // span_width(1)
    frequency.add(levels.blocks(frequency.blocks, blocks))
    self._levels, self._frequency = levels, frequency
    self.journal, self._access = journal, AccessCounts(store)
    self._record, self._generation = record, generation

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
  def gistnet_fingerprint(self) -> str:
    """Identity of the GistNet that made the gists."""
    return self._record["gistnet"]["fingerprint"]

  @property
  def lens_fingerprint(self) -> str | None:
    """Identity of what made the lens keys held; None if there are none."""
    return self._levels.lens["fingerprint"] if self._levels.lens else None

  @property
  def record(self) -> dict:
    """A copy of the commit record."""
    return json.loads(json.dumps(self._record))

  @property
  def extra(self) -> dict:
    """What the last commit stored beside the history."""
    return json.loads(json.dumps(self._record["extra"]))

  @property
  def refined(self) -> list[tuple[int, int]]:
    """Runs [start, stop) of blocks that `amend_gists` has dealt with."""
    return [(int(a), int(b)) for a, b in self._record.get("refined", [])]

  def as_stored(self, gists: np.ndarray) -> Float32[np.ndarray, "n D"]:
    """Gists [n, D] as they come back once they are stored."""
    rows = tree_format.pack_gists(
      np.asarray(gists, np.float32), self._record["gist_dtype"])
    return tree_format.unpack_gists(rows)

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

  def block_frequency(self, token_ids: np.ndarray, stop: int | None = None
                      ) -> np.ndarray:
    """How many complete blocks hold each token: int64 [n].

    Args:
      token_ids: int [n].
      stop: only blocks before this one; those from here on are read.
    """
    ids = np.asarray(token_ids)
    counts = self._frequency.counts[ids].astype(np.int64)
    if stop is not None:
      for block in range(stop, self.num_nodes(1)):
        counts -= np.isin(
          ids, self.tokens(block * BRANCHING, (block + 1) * BRANCHING))
    return counts

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
      kind = key.split("/")[0].split(".")[0]
      total[kind if kind in total else "other"] += size
    return total

  def _check_open(self) -> None:
    if self._closed:
      raise McjaxError(f"the tree at {self.url} is closed")
    if self._is_forked:
      raise McjaxError(
        f"the tree at {self.url} was opened by process {self._process}, not by"
        " its fork")

  @property
  def _is_forked(self) -> bool:
    """Whether this is another process than the one that opened the tree."""
    return os.getpid() != self._process

  def _check_nodes(self, level, start, stop, lowest=1) -> None:
    self._check_open()
    if level < lowest or not 0 <= start <= stop <= self.num_nodes(level):
      raise IndexError(f"no nodes {start}:{stop} at level {level}")


def joined(runs: Iterable[tuple[int, int]]) -> list[list[int]]:
  """Runs [start, stop) in order, those that touch or overlap as one."""
  out: list[list[int]] = []
  for start, stop in sorted(runs):
    if out and start <= out[-1][1]:
      out[-1][1] = max(out[-1][1], stop)
    else:
      out.append([start, stop])
  return out
