"""Carries a table of keys from one tokenizer's vocabulary to another's.

A key is a sum over tokens, so what a token of another vocabulary adds to it is
what the tokens that spell the same text add together. Nothing is trained, and
the key of a text comes out nearly the same whichever tokenizer cut it.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import jax.numpy as jnp
import numpy as np
import tqdm

from mcjax import pretrained
from mcjax.base.load import BaseLM, load_tokenizer
from mcjax.base.tokenizer import Tokenizer
from mcjax.lens import network as lensnet
from mcjax.lens.features import FEATURES
from mcjax.lens.keyer import TABLE
from mcjax.training.lens import key_distil
from mcjax.training.lens.key_distil import Tables, Texts
from mcjax.types import McjaxError


def carried(table: Mapping[str, np.ndarray], source: Tokenizer,
            target: Tokenizer, vocab_size: int) -> dict[str, np.ndarray]:
  """The table of `target`'s vocabulary that says what `table` says.

  A token that is no text of its own (a control token, a part of a character)
  counts nothing.

  Args:
    table: "vectors" [V, K] int8 and "salience" [V, 2] of `source`'s vocabulary.
    source, target: the tokenizers.
    vocab_size: rows of the result, the base's own count.

  Returns:
    as `table`, for `vocab_size` tokens.
  """
  vectors = np.asarray(table["vectors"], np.float32)
  salience = np.asarray(table["salience"], np.float32)
  # A token that counts nothing still has a direction, unlike any other.
  out = np.random.default_rng(0).standard_normal(
    (vocab_size, vectors.shape[1])).astype(np.float32)
  weights = np.zeros((vocab_size, 2), np.float32)
  for token in tqdm.trange(min(vocab_size, target.vocab_size), unit="token"):
    ids = _spelt(token, source, target)
    if len(ids):
      in_key, in_query = salience[ids].T @ vectors[ids]
      length = np.linalg.norm(in_key) + 1e-12
      out[token] = in_key / length
      weights[token] = length, max(0.0, float(in_query @ out[token]))
  return key_distil.table(Tables(jnp.asarray(out), jnp.asarray(weights)))


def shipped_params(base: str) -> dict:
  """Parameters of a base's shipped LensNet that has a table of keys.

  Raises:
    McjaxError: none is shipped, or it is of an older version.
  """
  path = pretrained.shipped(base, "lensnet")
  if path is None:
    raise McjaxError(f"config.carry_from: no LensNet is shipped for {base}")
  params, fields, _ = pretrained.read_weights(path, "lensnet")
  if TABLE not in params or fields.get("features") != FEATURES:
    raise McjaxError(f"{path} has no table of keys, or is an older LensNet")
  return params


def carried_scores(params: Mapping, fresh: Mapping) -> dict:
  """A LensNet that goes on from what another one makes of the features.

  Features mean the same in every vocabulary; what reads gists is left out.

  Args:
    params: of the other one.
    fresh: of the one that is to be.
  """
  parts = {part: {name: params[part][name] for name in fresh[part]}
           for part in ("score", "text")}
  return {**fresh, **parts, "apart": params["apart"]}


def carried_from(base: str, lm: BaseLM, held: Texts
                 ) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
  """The table of another base's shipped LensNet for the vocabulary of `lm`.

  Args:
    base: a named base with a LensNet that has a table.
    lm: the base that gets it.
    held: texts by which it is judged.

  Returns:
    the table, and its `key_distil.agreement` "after".

  Raises:
    McjaxError: no such LensNet is shipped.
  """
  params = shipped_params(base)
  table = carried(params[TABLE], load_tokenizer(base), lm.tokenizer,
                  len(lm.params["embed"]))
  known = Tables(*(jnp.asarray(table[k], jnp.float32)
                   for k in ("vectors", "salience")))
  return table, {"after": key_distil.agreement(known, held)}


def _spelt(token: int, source: Tokenizer, target: Tokenizer) -> np.ndarray:
  """Ids of `source` that spell a token of `target`; none where it is no text.
  """
  if token in target.special_ids:
    return np.zeros(0, np.int32)
  try:
    text = target.token_bytes(token).decode("utf-8")
  except UnicodeDecodeError:
    return np.zeros(0, np.int32)
  return source.encode(text)


def started(lm: BaseLM, path: str, key_dim: int, carry_from: str
            ) -> tuple[dict, dict, dict]:
  """Parameters, sizes and card of the LensNet that gets the keys.

  One that is there, or a fresh one, which reads no gists, so that it serves
  every base of the tokenizer.

  Args:
    lm: the base.
    path: of a LensNet; empty takes the shipped one, if there is any.
    key_dim: of a fresh one.
    carry_from: base whose scores a fresh one starts from; empty for none.
  """
  source = path or pretrained.shipped(lm.name, "lensnet")
  if source is not None:
    return pretrained.read_weights(source, "lensnet")
  lens = lensnet.LensNetConfig(
    d_model=lm.config.d_model, gists=False, key_dim=key_dim)
  params = lensnet.init_params(lens)
  if carry_from:
    params = carried_scores(shipped_params(carry_from), params)
  return params, dataclasses.asdict(lens), {}
