"""Format version 3 of a stored tree: its arrays, its record, its gist rows.

mcjax_tree.json   the record: who made it, how long it is; written last
tokens            [cursor] uint16, or uint32 above 65,536 ids
gists/E/L1, L2..  [nodes, D] of gist epoch E (`rebuild_gists` counts it up)
keys/L2, L3..     [nodes, key_dim(level)] uint8; level 1 is in the tokens
lens/E/L1, L2..   [nodes, K] and [nodes, 2K] int8 of lens epoch E, if the tree
                  keeps lens keys
access/L0, L1..   [nodes] uint32
frequency         [2, vocab_size] uint32, two slots
journal           [bytes] uint8, JSON lines of events

PATH/sums         [chunks] uint32: CRC-32 of every complete chunk of the rows of
                  an append-only array (tokens, gists, keys, lens, journal)
PATH/packed       the oldest rows of such an array, many more in a file
tokens.E, keys.E, journal.E: the same written anew, in epoch E

The record's "sums" holds, for each append-only array, the CRC-32 of the rows
of its last, incomplete chunk: those of a "sums" array too, which is checked as
the others are. Its "lens" is {"fingerprint", "key_dim", "epoch"}, or None in a
tree without lens keys; records from before there were any lack it.
"lens_epochs" counts the epochs that a tree ever had, so that none is used
twice. "journal" is the length of the journal in bytes; records from before
there was one lack it. "refined" are runs of blocks that `amend_gists` has dealt
with; most records lack it.

Its "commit" counts the commits; a copy of the record, written after it, tells
one that was put back from an older backup.

Its "packed" is {PATH: [rows, rows a file]} of what `compact` moved, "epochs"
holds those of tokens, keys and journal; both are missing at first.

Version 1 had no checksums; the first commit to such a tree makes them. Version
2 had no copy and no count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorstore as ts

from mcjax.tree import learned_keys as lens_keys
from mcjax.tree import lexical_keys as keys
from mcjax.tree.store import MAX_ROWS, ArraySpec
from mcjax.types import BRANCHING, McjaxError, span_width

FORMAT = "mcjax-tree"
FORMAT_VERSION = 3
PLAIN = ("tokens", "keys", "journal")  # kinds whose first epoch has no number
JOURNAL_SPEC = ArraySpec("uint8", 0, 2**12, 2**16)
GIST_DTYPES = ("bfloat16", "float32", "int8")
_BFLOAT16 = ts.bfloat16.numpy_dtype
_SCALE_BYTES = 4  # an int8 gist ends with its float32 scale


class Encoder(Protocol):
  """What the tree needs of a GistNet."""

  fingerprint: str
  d_model: int

  def encode_tokens(self, token_ids: np.ndarray) -> np.ndarray:
    """int32 [n, 32] -> float32 [n, D]."""

  def encode_gists(self, gists: np.ndarray, level: int) -> np.ndarray:
    """float32 [n, 32, D] of `level - 1` -> float32 [n, D] of `level`."""


def tokens_spec(vocab_size: int) -> ArraySpec:
  """Layout of the token ids: 64 or 128 kB a shard."""
  wide = vocab_size > 2**16
  return ArraySpec("uint32" if wide else "uint16", 0, 1024, 2**15)


def folder(kind: str, record: dict) -> str:
  """Where the columns of a kind ("gists", "keys", "lens") lie."""
  if kind == "gists":
    return f"gists/{record['gist_epoch']}"
  if kind == "lens":
    return f"lens/{record['lens']['epoch']}"
  epoch = record.get("epochs", {}).get(kind, 0)
  return f"{kind}.{epoch}" if epoch else kind


def column_spec(kind: str, level: int, record: dict) -> ArraySpec:
  """Layout of one level of a kind; a search reads 32 rows."""
  if kind == "keys":
    return ArraySpec("uint8", keys.key_dim(level), 32, 256)
  if kind == "lens":
    width = lens_keys.key_width(level, record["lens"]["key_dim"])
    return ArraySpec("int8", width, 128, 1024, compress=False)
  dtype = record["gist_dtype"]
  width = record["gistnet"]["d_model"]
  width += _SCALE_BYTES if dtype == "int8" else 0
  return ArraySpec(dtype, width, 32, 256, compress=False)


def kinds(record: dict) -> list[str]:
  """The kinds of columns that the record names."""
  return [*PLAIN, "gists", *(["lens"] if record.get("lens") else [])]


def next_epochs(record: dict, kinds: Iterable[str]) -> dict:
  """The record with the columns of some kinds written anew."""
  out: dict[str, Any] = dict(record, epochs=dict(record.get("epochs", {})))
  for kind in kinds:
    if kind == "gists":
      out["gist_epoch"] += 1
    elif kind == "lens":
      out["lens"] = out["lens"] | {"epoch": out["lens_epochs"]}
      out["lens_epochs"] += 1
    else:
      out["epochs"][kind] = out["epochs"].get(kind, 0) + 1
  return out


def epoch_folders(record: dict) -> set[str]:
  """The folders of epochs that the record names."""
  return {folder(kind, record) for kind in kinds(record)}


def past_folders(record: dict) -> set[str]:
  """The folders of every epoch up to those of the record."""
  out = {f"gists/{e}" for e in range(record["gist_epoch"] + 1)}
  out |= {f"lens/{e}" for e in range(record.get("lens_epochs", 0))}
  for kind in PLAIN:
    for epoch in range(record.get("epochs", {}).get(kind, 0) + 1):
      out.add(folder(kind, {"epochs": {kind: epoch}}))
  return out


def is_current(path: str, record: dict) -> bool:
  """Whether the record uses a column at that path."""
  return any(
    path == f or path.startswith(f + "/") for f in epoch_folders(record))


def without_past(record: dict) -> dict:
  """The record without what it says of columns it does not use any more."""
  out = dict(record)
  for field in ("packed", "sums"):
    if record.get(field) is not None:
      out[field] = {
        p: v for p, v in record[field].items() if is_current(p, record)}
  return out


class Place(NamedTuple):
  """One column of a tree as its record has it."""

  kind: str
  level: int
  path: str
  spec: ArraySpec
  length: int


def places(record: dict) -> list[Place]:
  """Every column with rows, children before parents."""
  cursor, journal = record["cursor"], record.get("journal", 0)
  found = [
    Place("tokens", 0, folder("tokens", record),
          tokens_spec(record["vocab_size"]), cursor),
    Place("journal", 0, folder("journal", record), JOURNAL_SPEC, journal),
  ]
  level = 1
  while nodes := cursor // span_width(level):
    for kind in kinds_of(level, record):
      spec = column_spec(kind, level, record)
      path = f"{folder(kind, record)}/L{level}"
      found.append(Place(kind, level, path, spec, nodes))
    level += 1
  return [place for place in found if place.length]


def kinds_of(level: int, record: dict) -> list[str]:
  """Kinds of columns that are stored of a level >= 1."""
  out = ["gists", "keys"] if level > 1 else ["gists"]
  return [*out, "lens"] if record.get("lens") else out


def pack_gists(gists: np.ndarray, dtype: str) -> np.ndarray:
  """float32 [n, D] -> the rows that are stored."""
  if dtype != "int8":
    return gists.astype(_BFLOAT16 if dtype == "bfloat16" else np.float32)
  scale = np.abs(gists).max(axis=1, keepdims=True) / 127
  scale = np.where(scale > 0, scale, 1).astype("<f4")
  values = np.clip(np.rint(gists / scale), -127, 127).astype(np.int8)
  return np.concatenate([values, scale.view(np.int8)], axis=1)


def unpack_gists(rows: np.ndarray) -> np.ndarray:
  """Inverse of `pack_gists`, to float32 [n, D]."""
  if rows.dtype != np.int8:
    return rows.astype(np.float32)
  scale = np.ascontiguousarray(rows[:, -_SCALE_BYTES:]).view("<f4")
  return rows[:, :-_SCALE_BYTES].astype(np.float32) * scale


def gistnet_fields(encoder: Encoder) -> dict[str, object]:
  """What the record says of a GistNet."""
  return {
    "fingerprint": encoder.fingerprint,
    "d_model": int(encoder.d_model),
  }


def with_lens(record: dict, keyer: lens_keys.Keyer | None) -> dict:
  """The record with a new epoch of lens keys, or without any."""
  if keyer is None:
    return {**record, "lens": None}
  epoch = record.get("lens_epochs", 0)
  lens = {
    "fingerprint": keyer.fingerprint,
    "key_dim": int(keyer.key_dim),
    "epoch": epoch,
  }
  return {**record, "lens": lens, "lens_epochs": epoch + 1}


def new_record(
  base_fingerprint: str,
  base_name: str,
  encoder: Encoder,
  vocab_size: int,
  gist_dtype: str,
  keyer: lens_keys.Keyer | None,
) -> dict:
  """The record of an empty tree. Raises: McjaxError on a bad argument."""
  if gist_dtype not in GIST_DTYPES:
    raise McjaxError(f"gist_dtype {gist_dtype!r} is not one of {GIST_DTYPES}")
  if not 0 < vocab_size <= 2**31:
    raise McjaxError(f"vocab_size {vocab_size} is not in 1..2**31")
  record = {
    "format": FORMAT,
    "version": FORMAT_VERSION,
    "base": {"fingerprint": base_fingerprint, "name": base_name},
    "gistnet": gistnet_fields(encoder),
    "vocab_size": int(vocab_size),
    "gist_dtype": gist_dtype,
    "gist_epoch": 0,
    "keys": keys.SCHEME,
    "cursor": 0,
    "commit": 1,
    "frequency": {"slot": 0, "blocks": 0},
    "sums": {},
    "extra": {},
  }
  return with_lens(record, keyer)


def check_record(
  record: dict,
  url: str,
  base_fingerprint: str,
  base_name: str,
  encoder: Encoder | None,
) -> None:
  """Raises McjaxError unless the record is readable and of these models."""
  check_readable(record, url)
  base = record["base"]
  if base["fingerprint"] != base_fingerprint:
    raise McjaxError(
      f"{url} was made with the base LM {base['name']}"
      f" ({base['fingerprint']}), not with {base_name} ({base_fingerprint})"
    )
  if encoder is not None:
    check_gistnet(record, url, encoder)


def check_gistnet(record: dict, url: str, encoder: Encoder) -> None:
  """Raises McjaxError unless the GistNet made the tree's gists."""
  made_with = record["gistnet"]["fingerprint"]
  if made_with != encoder.fingerprint:
    raise McjaxError(
      f"{url} holds gists of the GistNet {made_with}, not of"
      f" {encoder.fingerprint}: load that one, or rewrite the gists with"
      " tools/regist"
    )


def check_readable(record: dict, url: str) -> None:
  """Raises McjaxError unless this version can read what the record says."""
  if record.get("format") != FORMAT:
    raise McjaxError(f"{url} is not a tree but {record.get('format')!r:.99}")
  version = record.get("version")
  if type(version) is int and version > FORMAT_VERSION:
    raise McjaxError(
      f"{url} has format version {version}, newer than"
      f" {FORMAT_VERSION}, which this mcjax reads: update mcjax"
    )
  if fields := _wrong_fields(record):
    raise McjaxError(
      f"the commit record of {url} is damaged: field {fields[0]!r} is missing"
      " or makes no sense"
    )
  if record["keys"] != keys.SCHEME:
    raise McjaxError(
      f"{url} has keys of scheme {record['keys']}, not {keys.SCHEME}"
    )


def _wrong_fields(record: dict) -> list[str]:
  """Names of fields that no tree can have."""

  def whole(value: object, low: int = 0, high: int = MAX_ROWS) -> bool:
    return type(value) is int and low <= value <= high

  def texts(value: object, *names: str) -> bool:
    return isinstance(value, dict) and all(
      isinstance(value.get(name), str) for name in names)

  def get(name: str, *inner: str) -> Any:
    value = record.get(name)
    for key in inner:
      value = value.get(key) if isinstance(value, dict) else None
    return value

  lens, sums = get("lens"), get("sums")
  blocks = get("frequency", "blocks")
  crc = get("frequency", "crc")
  checks = {
    "version": whole(get("version"), 1, FORMAT_VERSION),
    "base": texts(get("base"), "name", "fingerprint"),
    "gistnet": texts(get("gistnet"), "fingerprint")
    and whole(get("gistnet", "d_model"), 1, 2**20),
    "vocab_size": whole(get("vocab_size"), 1, 2**31),
    "gist_dtype": get("gist_dtype") in GIST_DTYPES,
    "gist_epoch": whole(get("gist_epoch")),
    "keys": isinstance(get("keys"), str),
    "cursor": whole(get("cursor")),
    "frequency": whole(get("frequency", "slot"), 0, 1) and whole(blocks)
    and whole(get("cursor")) and blocks <= record["cursor"] // BRANCHING
    and (crc is None or whole(crc, 0, 2**32 - 1)),
    "commit": whole(record.get("commit", 0)),
    "epochs": _wholes(record.get("epochs", {})),
    "packed": _is_packed(record.get("packed", {})),
    "extra": isinstance(get("extra"), dict),
    "journal": whole(record.get("journal", 0)),
    "lens": lens is None or texts(lens, "fingerprint")
    and whole(get("lens", "key_dim"), 1, 2**20)
    and whole(get("lens", "epoch")),
    "lens_epochs": whole(record.get("lens_epochs", 0)),
    "sums": sums is None and get("version") == 1 or isinstance(sums, dict)
    and all(whole(value, 0, 2**32 - 1) for value in sums.values()),
  }
  return [name for name, fine in checks.items() if not fine]


def _wholes(value: object) -> bool:
  return isinstance(value, dict) and all(
    type(v) is int and 0 <= v <= MAX_ROWS for v in value.values())


def _is_packed(value: object) -> bool:
  return isinstance(value, dict) and all(
    isinstance(v, list) and len(v) == 2 and _wholes(dict(enumerate(v)))
    and v[1] > 0 for v in value.values())
