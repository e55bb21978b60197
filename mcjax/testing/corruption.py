"""Corrupts files of a stored tree, one at a time, and looks what is told.

A file is flipped in one bit, cut, deleted, exchanged with another one, or
replaced by an older version of itself. Then the tree is opened and everything
in it is read: what comes back must be right, or be refused in one line.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np

from mcjax.testing import tree_reference as reference
from mcjax.tree.check import check
from mcjax.tree.compaction import compact
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

WAYS = ("flip", "cut", "delete", "swap", "older")
_STOPS = (9_000, 100_000, 110_000)  # tokens at the commits
_UNTOUCHED = ("mcjax_tree.lock",)  # always empty


@dataclasses.dataclass(frozen=True)
class Case:
  """A tree, its older versions, and what it holds.

  Attributes:
    folder: of the tree.
    older: of its versions at earlier commits.
    content: what `contents` says of it.
  """

  folder: pathlib.Path
  older: tuple[pathlib.Path, ...]
  content: dict[str, Any]


def make_case(folder: pathlib.Path) -> Case:
  """Writes a tree in three commits with a compaction between."""
  ids, keyer = reference.random_ids(_STOPS[-1]), reference.TinyKeyer()
  url, older = folder / "tree", []
  tree = reference.create(url, keyer=keyer)
  for number, stop in enumerate(_STOPS):
    tree.append(ids[tree.cursor : stop])
    tree.journal.add("note", text="x" * (stop // 2))
    tree.record_access(np.array(1), np.arange(tree.num_nodes(1)))
    tree.commit({"stop": stop})
    if stop == _STOPS[-1]:
      break
    older.append(folder / f"older-{number}")
    shutil.copytree(url, older[-1])
    if number == 1:
      tree.close()
      compact(url)
      older.append(folder / "compacted")
      shutil.copytree(url, older[-1])
      tree = reference.reopen(url, keyer=keyer)
  tree.close()
  tree = reference.peek(url, keyer=keyer)
  reference.check(tree, ids, keyer=keyer)
  return Case(url, tuple(older), contents(tree))


def contents(tree: MegaContextTree) -> dict[str, Any]:
  """Everything in a tree but its statistics, as arrays and plain values."""
  out: dict[str, Any] = {
    "tokens": tree.tokens(0, tree.cursor),
    "frequency": tree.block_frequency(np.arange(tree.vocab_size)),
    "events": tree.journal.events,
    "extra": tree.extra,
  }
  for level in range(1, tree.top_level + 1):
    nodes = tree.num_nodes(level)
    out[f"gists {level}"] = tree.gists(level, 0, nodes)
    out[f"keys {level}"] = tree.keys(level, 0, nodes)
    out[f"lens {level}"] = tree.lens_keys(level, 0, nodes)
  return out


def kind_of(key: str) -> str:
  """What kind of file a key is: folder, level and part, without numbers."""
  parts = [p for p in key.split("/") if not p.isdigit() and p != "c"]
  return "/".join(parts)


def corruptions(case: Case, seed: int, count: int
                ) -> Iterator[tuple[str, str, str]]:
  """Corrupts one file at a time, every kind of file in turn.

  Yields:
    The kind of file, the way, and what came of it: "told at open", "told when
    read", "harmless" (all content is right), "SILENT" or "TRACEBACK".
  """
  rng = np.random.default_rng(seed)
  kinds: dict[str, list[str]] = collections.defaultdict(list)
  for path in sorted(case.folder.rglob("*")):
    key = path.relative_to(case.folder).as_posix()
    if path.is_file() and key not in _UNTOUCHED:
      kinds[kind_of(key)].append(key)
  every = sum(kinds.values(), [])
  for number in range(count):
    way = WAYS[number % len(WAYS)]
    kind = list(kinds)[number // len(WAYS) % len(kinds)]
    key = str(rng.choice(kinds[kind]))
    other = str(rng.choice([k for k in every if k != key]))
    older = case.older[int(rng.integers(len(case.older)))]
    kept = {k: (case.folder / k).read_bytes() for k in (key, other)}
    _corrupt(way, case.folder / key, case.folder / other, older / key, rng)
    try:
      yield kind, way, _outcome(case)
    finally:
      for k, raw in kept.items():
        (case.folder / k).write_bytes(raw)


def _corrupt(way: str, path: pathlib.Path, other: pathlib.Path,
             older: pathlib.Path, rng: np.random.Generator) -> None:
  raw = path.read_bytes()
  if way == "flip":
    at = int(rng.integers(len(raw)))
    changed = bytes([raw[at] ^ (1 << int(rng.integers(8)))])
    path.write_bytes(raw[:at] + changed + raw[at + 1 :])
  elif way == "cut":
    path.write_bytes(raw[: int(rng.integers(len(raw)))])
  elif way == "swap":
    path.write_bytes(other.read_bytes())
    other.write_bytes(raw)
  elif way == "older" and older.exists():
    path.write_bytes(older.read_bytes())
  else:
    path.unlink()


def _outcome(case: Case) -> str:
  try:
    found = _read(case)
    told = bool(check(case.folder).findings)
  except Exception as error:
    return f"TRACEBACK {error!r:.200}"
  if found.startswith("told") and not told:
    return "SILENT in a check"
  return found


def _read(case: Case) -> str:
  when = "told at open"
  try:
    tree = reference.peek(case.folder, keyer=reference.TinyKeyer())
    when = "told when read"
    found = contents(tree)
  except McjaxError as error:
    return when if "\n" not in str(error) else f"TRACEBACK {error}"
  same = found.keys() == case.content.keys() and all(
    np.array_equal(found[key], case.content[key]) for key in found)
  if not same:
    return "SILENT"
  try:
    for level in range(tree.top_level + 1):
      tree.access_counts(level, 0, tree.num_nodes(level))
  except McjaxError:
    return "told when read"
  return "harmless"


def table(outcomes: list[tuple[str, str, str]]) -> str:
  """How often what came of corruptions of each way and kind of file."""
  found = ["told at open", "told when read", "harmless"]
  found += sorted({o.split()[0] for _, _, o in outcomes} - {"told", "harmless"})
  lines = [f"{'':24}" + "".join(f"{name:>16}" for name in found)]
  for column in (1, 0):
    for name in sorted({o[column] for o in outcomes}):
      rows = [o[2] for o in outcomes if o[column] == name]
      counts = [sum(r.startswith(f) for r in rows) for f in found]
      lines.append(f"{name:24}" + "".join(f"{c:16d}" for c in counts))
  return "\n".join(lines)
