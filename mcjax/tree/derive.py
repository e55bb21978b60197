"""How nodes are made from what lies below them: gists, keys, lens keys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mcjax.tree import format as tree_format
from mcjax.tree import learned_keys as lens_keys
from mcjax.tree import lexical_keys as lexical
from mcjax.tree.columns import Column
from mcjax.tree.format import Encoder
from mcjax.types import BRANCHING, McjaxError, span_width


class NodeMaker:
  """Makes rows of nodes, as they are stored.

  Attributes:
    read: rows read for it so far.
  """

  def __init__(
    self,
    column: Callable[[str, int], Column],
    gist_dtype: str,
    encoder: Encoder | None,
    keyer: lens_keys.Keyer | None,
  ):
    """Args: column: the column of a kind and level that lies below."""
    self._column, self._gist_dtype = column, gist_dtype
    self._encoder, self._keyer = encoder, keyer
    self.read = 0

  def rows(self, kind: str, level: int, start: int, stop: int) -> np.ndarray:
    """Nodes [start, stop) of a level >= 1: "gists", "keys" or "lens".

    Raises:
      McjaxError: what is below cannot be read, or a gist is not finite.
    """
    make = {"gists": self._gists, "keys": self._keys, "lens": self._lens_keys}
    return make[kind](level, start, stop)

  def blocks(self, start: int, stop: int) -> np.ndarray:
    """Token ids of blocks [start, stop): int32 [n, 32]."""
    ids = self._column("tokens", 0).read(start * BRANCHING, stop * BRANCHING)
    return ids.astype(np.int32).reshape(-1, BRANCHING)

  def _below(self, kind: str, level: int, start: int, stop: int) -> np.ndarray:
    """Children [n * 32, ...] of nodes [start, stop) of a level."""
    self.read += (stop - start) * BRANCHING
    return self._column(kind, level - 1).read(
      start * BRANCHING, stop * BRANCHING)

  def _gists(self, level: int, start: int, stop: int) -> np.ndarray:
    encoder = self._encoder
    assert encoder is not None
    n, width = stop - start, encoder.d_model
    if level == 1:
      self.read += n * BRANCHING
      gists = encoder.encode_tokens(self.blocks(start, stop))
    else:
      rows = self._below("gists", level, start, stop)
      children = tree_format.unpack_gists(rows).reshape(n, BRANCHING, -1)
      gists = encoder.encode_gists(children, level)
    gists = np.asarray(gists, np.float32)
    if gists.shape != (n, width):
      raise ValueError(f"gists of shape {gists.shape}, not {(n, width)}")
    if not np.isfinite(gists).all():
      raise McjaxError(
        f"the GistNet {encoder.fingerprint} made a gist of level {level} that"
        " is not finite"
      )
    return tree_format.pack_gists(gists, self._gist_dtype)

  def _keys(self, level: int, start: int, stop: int) -> np.ndarray:
    if lexical.key_dim(level) != lexical.key_dim(level - 1):
      self.read += (stop - start) * span_width(level)
      return self.sketch(level, start, stop)
    rows = self._below("keys", level, start, stop)
    return lexical.union(rows.reshape(stop - start, BRANCHING, -1))

  def _lens_keys(self, level: int, start: int, stop: int) -> np.ndarray:
    if level == 1:
      assert self._keyer is not None
      self.read += (stop - start) * BRANCHING
      rows = self._column("gists", 1).read(start, stop)
      gists = tree_format.unpack_gists(rows)
      return lens_keys.block_keys(self._keyer, self.blocks(start, stop), gists)
    rows = self._below("lens", level, start, stop)
    key_dim = rows.shape[1] // (1 if level == 2 else 2)
    return lens_keys.bounds(
      rows.reshape(stop - start, BRANCHING, -1), key_dim)

  def sketch(self, level: int, start: int, stop: int) -> np.ndarray:
    """Keys of nodes [start, stop), from their tokens and the few before."""
    width = span_width(level)
    low = max(0, start * width - lexical.LOOKBACK)
    ids = self._column("tokens", 0).read(low, stop * width).astype(np.int64)
    missing = lexical.LOOKBACK - (start * width - low)
    ids = np.concatenate([np.full(missing, -1), ids])
    spans = np.lib.stride_tricks.sliding_window_view(
      ids, lexical.LOOKBACK + width
    )[::width]
    return lexical.sketch(spans, level)
