"""Repairs a stored tree: all that follows from what is still there.

The commit record comes back from its copy, array metadata and checksums from
what they must be, gists and keys from the tokens. Tokens and the journal are
never guessed. What is made anew is written beside the old and switched to with
one commit, so a repair can be interrupted and done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import os

import numpy as np

from mcjax.tree import check as checking
from mcjax.tree import commits
from mcjax.tree import format as tree_format
from mcjax.tree import lock as writer_lock
from mcjax.tree.check import Finding, Report, check
from mcjax.tree.columns import SUMS
from mcjax.tree.compaction import Models
from mcjax.tree.counts import AccessCounts, frequency_spec
from mcjax.tree.format import Place
from mcjax.tree.journal import overlaps
from mcjax.tree.rewrite import Rewrite, open_column, recount
from mcjax.tree.store import (
  COPY_KEY,
  RECORD_KEY,
  ArraySpec,
  Store,
  encode_record,
)
from mcjax.tree.sums_repair import mend_sums
from mcjax.types import McjaxError

_ROUNDS = 4
_DERIVED = ("keys", "gists", "lens")  # each is made of those before it


def repair(url: str | os.PathLike[str], models: Models | None = None
           ) -> tuple[Report, list[str]]:
  """Repairs what can be repaired.

  Args:
    url: of a tree that is open for writing nowhere.
    models: called where gists or lens keys have to be made anew.

  Returns:
    What a check says afterwards, and what was done, a line each.

  Raises:
    McjaxError: no tree, of a newer format, or open for writing elsewhere.
  """
  report, done = check(url), []
  for mend in checking.MENDS:
    # One array that cannot be opened may hide another one.
    for _ in range(_ROUNDS if mend == "metadata" else 1):
      findings = [f for f in report.findings if f.mend == mend]
      if not findings:
        break
      done += _MENDS[mend](Store(url), report, findings, models)
      report = check(url)
  return report, done


def _mend_record(store: Store, report: Report, findings: list[Finding],
                 models: Models | None) -> list[str]:
  """Writes the newest record that can be read in both places."""
  del findings, models
  lock = writer_lock.acquire(store)
  try:
    for key in (RECORD_KEY, COPY_KEY):
      try:
        store.read_record(key)
      except McjaxError:  # no plain file, or far too large
        store.delete(key)
    generation = store.read_record()[1]
    store.write_record(encode_record(report.record), generation)
  finally:
    lock.release()
  return [f"the commit record is that of commit {report.record.get('commit')}"]


def _mend_metadata(store: Store, report: Report, findings: list[Finding],
                   models: Models | None) -> list[str]:
  """Writes array metadata again; they follow from the record."""
  del models
  specs = {"frequency": frequency_spec(report.record["vocab_size"])}
  for place in tree_format.places(report.record):
    specs[place.path] = place.spec
    specs |= dict.fromkeys((f"{place.path}/sums", f"{place.path}/sums/sums"),
                           SUMS)
    if packed := report.record.get("packed", {}).get(place.path):
      specs[f"{place.path}/packed"] = place.spec._replace(shard=packed[1])
  done = []
  with commits.maintaining(store):
    for path in dict.fromkeys(f.where for f in findings):
      spec = specs.get(path, AccessCounts.SPEC)
      _write_metadata(store, path, spec)
      done.append(f"{path}: metadata written again")
  return done


def _write_metadata(store: Store, path: str, spec: ArraySpec) -> None:
  store.delete(f"{path}/zarr.json")
  store.array(path, spec, create=True)


def _mend_sums(store: Store, report: Report, findings: list[Finding],
               models: Models | None) -> list[str]:
  """Computes checksums again that the checksum above them vouches for."""
  del models
  wanted = {f.where for f in findings}
  done: list[str] = []
  with commits.maintaining(store) as head:
    for place in tree_format.places(report.record):
      if any(path.startswith(place.path + "/sums") for path in wanted):
        done += mend_sums(store, head.record, place)
  return done


def _mend_derived(store: Store, report: Report, findings: list[Finding],
                  models: Models | None) -> list[str]:
  """Makes lost gists and keys anew, from what is below them."""
  if report.record["version"] == 1:
    return [f"{report.url} is of format version 1, without checksums: nothing"
            " says what of it is right"]
  bad: dict[str, tuple[tuple[int, int], ...]] = {}
  for f in findings:
    bad[f.where] = checking.merged(sorted((*bad.get(f.where, ()), *f.rows)))
  done = []
  for kind in _DERIVED:
    paths = {p.path: p for p in tree_format.places(report.record)
             if p.kind == kind and p.path in bad}
    if paths:
      done.append(_derive(store, kind, {p: bad[p] for p in paths}, models))
  return done


def _derive(store: Store, kind: str,
            bad: dict[str, tuple[tuple[int, int], ...]],
            models: Models | None) -> str:
  """Rewrites the columns of one kind; a line of what became of it."""
  levels = {path.rpartition("/")[2]: np.array(rows) for path, rows in
            bad.items()}

  def dirty(place: Place, start: int, stop: int) -> np.ndarray:
    rows = levels.get(f"L{place.level}", np.zeros((0, 2), np.int64))
    index = np.arange(start, stop)
    return overlaps(rows, index, index + 1)

  count = sum(stop - start for rows in bad.values() for start, stop in rows)
  try:
    encoder, keyer = models() if models and kind != "keys" else (None, None)
    with commits.maintaining(store) as head:
      new = Rewrite(head, [kind], encoder, keyer)
      new.run(dirty)
      head.write(new.record)
  except McjaxError as error:
    return f"{kind}: {count} rows stay lost: {error}"
  return f"{kind}: {count} rows made anew"


def _recount(store: Store, report: Report, findings: Iterable[Finding],
             models: Models | None) -> list[str]:
  del report, findings, models
  with commits.maintaining(store) as head:
    place = tree_format.places(head.record)[0]
    tokens = open_column(store, head.record, place)
    try:
      counts = recount(store, head.record, tokens)
    except McjaxError as error:
      return [f"token frequencies stay lost: {error}"]
    head.write(dict(head.record, frequency=counts))
  return ["token frequencies counted again"]


def _drop(store: Store, report: Report, findings: list[Finding],
          models: Models | None) -> list[str]:
  """Deletes statistics that cannot be read; they begin at zero again."""
  del report, models
  done = []
  with commits.maintaining(store):
    for finding in findings:
      store.delete(finding.where + "/")
      done.append(f"{finding.where}: statistics begin again")
  return done


_MENDS: dict[str, Callable[..., list[str]]] = {
  "record": _mend_record,
  "metadata": _mend_metadata,
  "sums": _mend_sums,
  "derive": _mend_derived,
  "recount": _recount,
  "drop": _drop,
}
