"""Learned keys: what a text is about, as a few small numbers.

A key is the sum over a text's tokens of a vector and a salience per vocabulary
entry, of unit length, in int8. The tables are either LensNet's key heads over
the base's embeddings, or, where its weights hold one, a table of their own that
was taught what a sentence embedding finds alike (`training/key_distil.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import jax
import numpy as np

from mcjax import lensnet, pretrained
from mcjax.base.load import BaseLM

TABLE = "table"  # of a LensNet's parameters, beside "score" and "keys"
_BATCH = 2048  # texts per call


class LensKeyer:
  """Writes a block's key; `lens_keys.Keyer` of a LensNet on a base.

  Attributes:
    fingerprint: of weights, configuration and base.
    key_dim: K.
  """

  def __init__(self, params: Mapping, config: lensnet.LensNetConfig,
               lm: BaseLM):
    """Reads the table of `params`, or makes one by its key heads.

    Args:
      params: of a LensNet; `params["table"]`, where there is one, holds
        "vectors" [V, K] int8 and "salience" [V, 2] float32: how much a token
        counts in a key and in a query.
      config: its sizes.
      lm: the base.
    """
    facts = dataclasses.asdict(config) | {"base": lm.fingerprint}
    if TABLE in params:
      table = params[TABLE]
      self.fingerprint = pretrained.fingerprint(table, facts)
      self._vectors = np.asarray(table["vectors"], np.float32)
      self._salience, self._asking = np.asarray(table["salience"]).T
    else:
      self.fingerprint = pretrained.fingerprint(params["keys"], facts)
      tables = jax.jit(
        lambda p, e: lensnet.key_tables(p, config, e)
      )({"keys": params["keys"]}, lm.params["embed"])
      self._vectors, self._salience, self._asking = map(np.asarray, tables)
    self.key_dim = self._vectors.shape[1]

  @classmethod
  def of_heads(cls, params: Mapping, config: lensnet.LensNetConfig, lm: BaseLM
               ) -> LensKeyer:
    """As the key heads have it, whether or not there is a table."""
    return cls({"keys": params["keys"]}, config, lm)

  def encode_keys(self, token_ids: np.ndarray, gists: np.ndarray | None = None
                  ) -> np.ndarray:
    """int32 [n, T] -> int8 [n, K]; the gists are not looked at; -1 is none."""
    del gists
    out = np.empty((len(token_ids), self.key_dim), np.int8)
    for a in range(0, len(token_ids), _BATCH):
      ids = token_ids[a : a + _BATCH]
      weights = np.where(ids >= 0, self._salience[ids], np.float32(0))
      total = np.einsum("nt,ntk->nk", weights, self._vectors[ids])
      out[a : a + _BATCH] = _rounded(total)
    return out

  def query(self, token_ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int32 [K] query of token ids [Q] with weights [Q]."""
    total = (weights * self._asking[token_ids]) @ self._vectors[token_ids]
    return _rounded(total[None])[0].astype(np.int32)


def _rounded(total: np.ndarray) -> np.ndarray:
  """Unit vectors [n, K] of `total` as int8."""
  length = np.sqrt(np.sum(np.square(total), axis=1, keepdims=True) + 1e-6)
  scaled = np.rint(total / length * lensnet.KEY_SCALE)
  return np.clip(scaled, -127, 127).astype(np.int8)
