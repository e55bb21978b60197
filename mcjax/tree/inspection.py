"""What a stored tree holds, as plain figures."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from mcjax.tree import commits
from mcjax.tree.store import Store
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError, span_width

_STEP = 1 << 20  # counts read at once


def open_any(url: str | os.PathLike[str]) -> MegaContextTree:
  """A reader of a tree of any base and GistNet. Raises: McjaxError."""
  record, _ = commits.read_commit(Store(url))
  base = record.get("base")
  if not isinstance(base, dict):
    raise McjaxError(f"the commit record of {url} names no base LM")
  return MegaContextTree.open(
    url, base_fingerprint=base.get("fingerprint", ""),
    base_name=base.get("name", ""), encoder=None, mode="r")


def inspect(tree: MegaContextTree) -> dict[str, Any]:
  """Header, levels with access counts, bytes by part, documents.

  Raises:
    McjaxError: something of it cannot be read.
  """
  record = tree.record
  store = Store(tree.url)
  events = tree.journal.events
  gone = {(e["start"], e["stop"]) for e in tree.journal.of("forgotten")}
  return {
    "url": tree.url,
    "tokens": tree.cursor,
    "commit": record.get("commit", 0),
    "version": record["version"],
    "base": record["base"],
    "gistnet": record["gistnet"],
    "gist_dtype": record["gist_dtype"],
    "vocab_size": record["vocab_size"],
    "lens": tree.lens_fingerprint,
    "levels": [_level(tree, level) for level in range(tree.top_level + 1)],
    "parts": _parts(store, tree.cursor),
    "documents": [
      {key: e.get(key) for key in ("name", "start", "stop", "time")}
      | {"metadata": e.get("metadata", {})}
      for e in events if e["kind"] == "document"
      and (e["start"], e["stop"]) not in gone],
    "forgotten_tokens": int(
      np.diff(tree.journal.forgotten, axis=1).sum()),
  }


def _level(tree: MegaContextTree, level: int) -> dict[str, Any]:
  nodes, total, used, most = tree.num_nodes(level), 0, 0, (0, None)
  for start in range(0, nodes, _STEP):
    counts = tree.access_counts(level, start, min(start + _STEP, nodes))
    total += int(counts.sum(dtype=np.int64))
    used += int(np.count_nonzero(counts))
    at = int(counts.argmax())
    if counts[at] > most[0]:
      most = int(counts[at]), start + at
  return {"level": level, "nodes": nodes, "tokens_a_node": span_width(level),
          "accesses": total, "nodes_used": used, "most_used": most[1]}


def _parts(store: Store, tokens: int) -> dict[str, dict[str, Any]]:
  """Bytes, bytes a token and files of each part of a tree."""
  found: dict[str, list[int]] = {}
  for key, size in store.sizes().items():
    part = key.split("/")[0].split(".")[0]
    part = "record" if part == "mcjax_tree" else part
    found.setdefault(part, []).append(size)
  found["all"] = [size for sizes in found.values() for size in sizes]
  return {
    part: {"bytes": sum(sizes), "bytes_a_token": sum(sizes) / max(1, tokens),
           "files": len(sizes)}
    for part, sizes in sorted(found.items(), key=lambda f: sum(f[1]))}
