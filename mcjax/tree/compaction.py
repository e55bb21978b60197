"""Compaction: many small files become few, and forgotten text is erased.

Both write beside what is there and switch with one commit, so a process that
is killed leaves the old state or the new one; what it left besides is cleared
up by the next compaction. A reader that is open meanwhile goes on; behind an
erasure it is told to refresh.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import json
import os

import numpy as np

from mcjax.tree import commits
from mcjax.tree import format as tree_format
from mcjax.tree.commits import Head
from mcjax.tree.format import Encoder, Place
from mcjax.tree.journal import FORGOTTEN, Journal, overlaps
from mcjax.tree.learned_keys import Keyer
from mcjax.tree.lexical_keys import LOOKBACK
from mcjax.tree.rewrite import FILLER, Rewrite, open_column
from mcjax.tree.store import ArraySpec, Store, io_errors
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError, span_width

_FEWEST = 8  # files that are worth merging
_MOST = 32  # files that become one
_PACKED_BYTES = 16 << 20  # of one, before compression
_TOKENS = 1 << 16  # looked at a time


@dataclasses.dataclass(frozen=True)
class Compacted:
  """What a compaction did.

  Attributes:
    files_before, files_after: of its arrays.
    erased: forgotten tokens that were still there.
  """

  files_before: int
  files_after: int
  erased: int


# Loads a tree's GistNet, and its lens keys' maker where it has such keys.
Models = Callable[[], tuple[Encoder, Keyer | None]]


def compact(url: str | os.PathLike[str], models: Models | None = None
            ) -> Compacted:
  """Merges sealed files, and erases the text of forgotten documents.

  Args:
    url: of a tree that is open for writing nowhere.
    models: called where there is text to erase.

  Raises:
    McjaxError: the tree is damaged, in use, or needs a model; or a failed
      write. It is then as before.
  """
  store = Store(url)
  with commits.maintaining(store) as head:
    record = head.record
  if record["version"] == 1:
    _upgrade(url, record)
  with commits.maintaining(store) as head:
    before = _files(store)
    _clear(head)
    erased = erase(head, models)
    pack(head)
    return Compacted(before, _files(store), erased)


def _files(store: Store) -> int:
  return sum(not key.startswith("mcjax_tree.") for key in store.keys())


def _upgrade(url: str | os.PathLike[str], record: dict) -> None:
  """Gives a tree of format version 1 its checksums."""
  base = record["base"]
  with MegaContextTree.open(
    url, base_fingerprint=base["fingerprint"], base_name=base["name"],
    encoder=None
  ) as tree:
    tree.commit()


def pack(head: Head) -> None:
  """Moves the rows of sealed files into larger ones. Raises: McjaxError."""
  moved = dict(head.record.get("packed", {}))
  for place in tree_format.places(head.record):
    if rows := _pack_column(head, place):
      moved[place.path] = rows
  if moved != head.record.get("packed", {}):
    head.write(dict(head.record, packed=moved))
  _delete_packed(head)


def _pack_column(head: Head, place: Place) -> list[int] | None:
  """Writes the packed rows; how many there are, and rows a file."""
  column = open_column(head.store, head.record, place)
  sealed = place.length // place.spec.shard * place.spec.shard
  if (sealed - column.packed) // place.spec.shard < _FEWEST:
    return None
  known = head.record.get("packed", {}).get(place.path)
  shard = known[1] if known else packed_shard(place.spec)
  array = column.packed_array(shard, create=True)
  at = column.packed
  while at < sealed:
    stop = min(sealed, (at // shard + 1) * shard)
    rows = column.read(at, stop)
    with io_errors(f"write {place.path} of", head.store.url):
      array[at:stop].write(rows).result()
    at = stop
  return [sealed, shard]


def packed_shard(spec: ArraySpec) -> int:
  """Rows of a packed file: 32 times as many, at most 16 MiB of them."""
  size = spec.numpy_dtype.itemsize * max(1, spec.width) * spec.shard
  factor = _MOST
  while factor > 1 and factor * size > _PACKED_BYTES:
    factor //= 2
  return factor * spec.shard


def _delete_packed(head: Head) -> None:
  """Deletes the small files whose rows are packed."""
  packed = head.record.get("packed", {})
  for place in tree_format.places(head.record):
    if place.path in packed:
      below = packed[place.path][0] // place.spec.shard
      head.store.delete_shards(place.path, below)


def _clear(head: Head) -> None:
  """Deletes what killed processes left besides the tree."""
  head.store.remove_litter()
  used = tree_format.epoch_folders(head.record)
  with contextlib.suppress(McjaxError):  # the next compaction tries again
    for folder in tree_format.past_folders(head.record) - used:
      head.store.delete(folder + "/")


def erase(head: Head, models: Models | None) -> int:
  """Overwrites forgotten text, and makes anew all that was made of it.

  Tokens keep their places. Names, digests and metadata of forgotten documents
  go as well.

  Returns:
    How many tokens were erased.

  Raises:
    McjaxError: a model is missing, or a failed write.
  """
  record = head.record
  journal = Journal(
    head.store, record.get("journal", 0), record["sums"],
    tree_format.folder("journal", record))
  spans = journal.forgotten
  erased = _still_there(head, spans)
  if not erased:
    return 0

  def dirty(place: Place, start: int, stop: int) -> np.ndarray:
    index, width = np.arange(start, stop), span_width(place.level)
    before = LOOKBACK if place.kind == "keys" else 0
    return overlaps(spans, index * width - before, (index + 1) * width)

  encoder, keyer = models() if models else (None, None)
  new = Rewrite(head, tree_format.kinds(record), encoder, keyer)
  new.run(dirty)
  new.write_journal(_without_forgotten(journal.events))
  new.recount()
  head.write(new.record)
  return erased


def _still_there(head: Head, spans: np.ndarray) -> int:
  """Tokens of the spans that are not erased."""
  count = 0
  if not len(spans):
    return count
  place = tree_format.places(head.record)[0]
  tokens = open_column(head.store, head.record, place)
  for start, stop in spans.tolist():
    for low in range(start, stop, _TOKENS):
      rows = tokens.read(low, min(low + _TOKENS, stop))
      count += int(np.count_nonzero(rows != FILLER))
  return count


def _without_forgotten(events: list[dict]) -> bytes:
  """The journal's lines; of forgotten documents only the place is left."""
  gone = {(e["start"], e["stop"]) for e in events if e["kind"] == FORGOTTEN}
  lines = []
  for event in events:
    if event["kind"] != FORGOTTEN and (
        event.get("start"), event.get("stop")) in gone:
      blank: dict = {str: "", dict: {}}
      event = {
        key: blank.get(type(value), value) for key, value in event.items()
      } | {"kind": event["kind"]}
    lines.append(json.dumps(event, separators=(",", ":")) + "\n")
  return "".join(lines).encode()
