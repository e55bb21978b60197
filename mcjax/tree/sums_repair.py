"""Lost checksums, computed again from the rows and proven by those above.

Each array of checksums has checksums in its turn, up to the one in the commit
record. So a lost page can be made from the rows below it, and is taken only if
what is above vouches for it.
"""

from __future__ import annotations

import numpy as np

from mcjax.tree import columns
from mcjax.tree.columns import Column
from mcjax.tree.format import Place
from mcjax.tree.rewrite import open_column
from mcjax.tree.store import Store
from mcjax.types import McjaxError


def mend_sums(store: Store, record: dict, place: Place) -> list[str]:
  """Writes the pages of lost checksums that can be proven.

  Returns:
    What was done, a line for each array.

  Raises:
    McjaxError: a failed write.
  """
  made, column = [], open_column(store, record, place)
  below, depth = column, 0
  while below.sums is not None:
    made.append(_candidates(below, made[-1] if made else None))
    below, depth = below.sums, depth + 1
  done = []
  for depth in range(len(made), 0, -1):  # the highest first
    sums = open_column(store, record, place)  # sees what was mended above
    for _ in range(depth):
      assert sums.sums is not None
      sums = sums.sums
    if lost := list(sums.damage()):
      values, known = made[depth - 1]
      _write(store, sums, values, known, lost)
      done.append(f"{sums.path}: {len(lost)} pages of checksums made anew")
  return done


def _candidates(column: Column, rows: tuple[np.ndarray, np.ndarray] | None
                ) -> tuple[np.ndarray, np.ndarray]:
  """What the checksums of a column must be if its rows are right.

  Args:
    column: of rows, or of checksums.
    rows: candidates for its rows, and which of them are known, where it is of
      checksums.

  Returns:
    uint32 [chunks], and bool [chunks] which of them are known.
  """
  values, known = column.stored_sums()
  if rows is None:
    return values, known
  chunk = column.spec.chunk
  lost = {start // chunk for start, _ in column.damage()}
  for page in lost & set(range(len(values))):
    span = slice(page * chunk, (page + 1) * chunk)
    known[page] = rows[1][span].all()
    values[page] = columns.checksum(rows[0][span])
  return values, known


def _write(store: Store, sums: Column, values: np.ndarray, known: np.ndarray,
           lost: list[tuple[int, int]]) -> None:
  pages, chunk = {}, sums.spec.chunk
  for start in range(0, sums.length, chunk):
    stop = min(start + chunk, sums.length)
    page = values[start:stop]
    if (start, stop) not in lost:
      pages[start] = sums.read(start, stop)
    elif known[start:stop].all() and _proven(sums, start, page):
      pages[start] = page
  store.delete(f"{sums.path}/c/")
  array = store.array(sums.path, sums.spec, create=True)
  for start, page in pages.items():
    array[start : start + len(page)].write(page).result()


def _proven(sums: Column, start: int, page: np.ndarray) -> bool:
  try:
    return all(sums.vouches(start, page))
  except McjaxError:  # what is above is lost as well
    return False
