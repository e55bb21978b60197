"""Learned keys: what a text is about, as a few small numbers.

A key is the sum over a text's tokens of a vector and a salience per vocabulary
entry, of unit length, in int8. The tables are either LensNet's key heads over
the base's embeddings, or, where its weights hold one, a table of their own that
was taught what a sentence embedding finds alike (`training/key_distil.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools

import jax
import numpy as np

from mcjax import pretrained
from mcjax.base.load import BaseLM
from mcjax.lens import network as lensnet

TABLE = "table"  # of a LensNet's parameters, beside "score" and "keys"
_BATCH = 2048  # texts per call
_MOST = 4  # tables of this process that are kept
_TABLES: dict[str, tuple] = {}  # by fingerprint, the oldest first


class LensKeyer:
  """A `learned_keys.Keyer`: tokens of a block in, its learned key out.

  Attributes:
    fingerprint: of weights, configuration and base.
    key_dim: K.
    by_meaning: whether its keys say what is alike in meaning.
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
    if config.gists:
      del facts["gists"]  # of keys that are older than the field
    part = TABLE if TABLE in params else "keys"
    self.fingerprint = pretrained.fingerprint(params[part], facts)
    make = functools.partial(_make_tables, params, config, lm)
    self._vectors, self._salience, self._asking = _kept(self.fingerprint, make)
    self.key_dim = self._vectors.shape[1]
    self.by_meaning = part == TABLE

  @property
  def vectors(self) -> np.ndarray:
    """[V, K] float32 of tokens."""
    return self._vectors

  @property
  def salience(self) -> np.ndarray:
    """[V] float32 how much a token counts in a key."""
    return self._salience

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


def _kept(fingerprint: str, make: Callable[[], tuple]) -> tuple:
  """Tables that are made once a process, the last few of them."""
  if fingerprint not in _TABLES:
    while len(_TABLES) >= _MOST:
      _TABLES.pop(next(iter(_TABLES)))
    _TABLES[fingerprint] = make()
  return _TABLES[fingerprint]


def _make_tables(params, config, lm: BaseLM) -> tuple:
  """Vectors [V, K], saliences in keys [V] and in queries [V], float32."""
  if TABLE in params:
    table = params[TABLE]
    return (np.asarray(table["vectors"], np.float32),
            *np.asarray(table["salience"]).T)
  return tuple(map(np.asarray, _head_tables(
    {"keys": params["keys"]}, config, lm.params["embed"])))


_head_tables = jax.jit(lensnet.key_tables, static_argnames="config")


def _rounded(total: np.ndarray) -> np.ndarray:
  """Unit vectors [n, K] of `total` as int8."""
  length = np.sqrt(np.sum(np.square(total), axis=1, keepdims=True) + 1e-6)
  scaled = np.rint(total / length * lensnet.KEY_SCALE)
  return np.clip(scaled, -127, 127).astype(np.int8)
