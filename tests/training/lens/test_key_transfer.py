"""Keys carried to another vocabulary say of a text what they said before."""

import numpy as np
import tokenizers
from tokenizers import models

from mcjax.base.tokenizer import Tokenizer
from mcjax.lens import network as lensnet
from mcjax.lens.features import empty_inputs
from mcjax.testing import tiny_models
from mcjax.training.lens import key_transfer


def _bytes() -> Tokenizer:
  return Tokenizer(tiny_models.byte_tokenizer())


def _merged() -> Tokenizer:
  """The byte tokenizer with two tokens more, of several bytes each."""
  core = tiny_models.byte_tokenizer()
  vocab = {t: i for i, t in enumerate(tiny_models.byte_tokens())}
  vocab |= {"th": len(vocab), "the": len(vocab) + 1}
  made = tokenizers.Tokenizer(models.BPE(
    vocab=vocab, merges=[("t", "h"), ("th", "e")]))
  made.pre_tokenizer, made.decoder = core.pre_tokenizer, core.decoder
  made.add_special_tokens(list(core.get_added_tokens_decoder().values()))
  return Tokenizer(made)


def _sum(table, ids, which) -> np.ndarray:
  """The key (0) or query (1) of token ids, before it is scaled."""
  weights = table["salience"][ids, which]
  return weights @ table["vectors"][ids].astype(np.float32)


def test_a_text_has_the_same_key_in_both_vocabularies():
  source, target = _bytes(), _merged()
  draw = np.random.default_rng(0)
  table = {
    "vectors": draw.integers(-127, 128, (source.vocab_size, 24)).astype(
      np.int8),
    "salience": draw.uniform(0.1, 1, (source.vocab_size, 2)).astype(
      np.float32)}
  rows = target.vocab_size + 6  # as where a base pads its embeddings
  got = key_transfer.carried(table, source, target, rows)
  assert got["vectors"].shape == (rows, 24)
  assert got["vectors"].dtype == np.int8
  text = "the thing there"
  ids = target.encode(text)
  assert len(ids) < len(text)
  want = _sum(table, source.encode(text), 0)
  error = np.abs(_sum(got, ids, 0) - want).max()
  assert error < 0.02 * np.abs(want).max()  # of rounding to int8
  single = source.encode("z")
  np.testing.assert_allclose(
    _sum(got, target.encode("z"), 1), _sum(table, single, 1), rtol=0.02,
    atol=2.0)


def test_what_is_no_text_counts_nothing():
  source, target = _bytes(), _merged()
  table = {"vectors": np.full((source.vocab_size, 4), 9, np.int8),
           "salience": np.ones((source.vocab_size, 2), np.float32)}
  got = key_transfer.carried(table, source, target, target.vocab_size + 1)
  silent = [*target.special_ids, target.vocab_size]
  assert not got["salience"][silent].any()
  assert np.linalg.norm(got["vectors"][silent].astype(float), axis=1).min() > 1
  part = int(target.encode("\u6f22")[0])  # the first byte of three
  assert not got["salience"][part].any()


def test_scores_go_on_without_what_reads_gists():
  sizes = dict(d_model=8, width=8, heads=2, feature_width=8, key_dim=4)
  whole = lensnet.init_params(lensnet.LensNetConfig(**sizes), seed=2)
  config = lensnet.LensNetConfig(**sizes, gists=False)
  got = key_transfer.carried_scores(whole, lensnet.init_params(config))
  assert "match_block" in whole["score"] and "match_block" not in got["score"]
  np.testing.assert_array_equal(
    got["text"]["feature_in"]["kernel"], whole["text"]["feature_in"]["kernel"])
  out = lensnet.evaluate(got, config, empty_inputs(4, 3))  # of any width
  assert out.rank.shape == (4,)
