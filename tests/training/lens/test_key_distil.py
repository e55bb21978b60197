"""Keys learn what the teacher finds alike, and records are used again."""

import dataclasses

import numpy as np
import pytest

from mcjax.lens import keyer as lens_keyer
from mcjax.lens import network as lensnet
from mcjax.training.lens import key_distil
from mcjax.training.lens.key_distil import KeyConfig, Texts
from mcjax.types import BRANCHING, McjaxError

VOCAB, WIDTH = 64, 32
CONFIG = KeyConfig(key_dim=16, blocks=400, questions=300, steps=120, batch=64,
                   near=8, learning_rate=2e-2)
EMBEDDINGS = np.random.default_rng(5).normal(size=(VOCAB, 32))


def unit(x):
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def synonyms():
  """Texts for a teacher to whom tokens 2k and 2k + 1 are the same word.

  Its vectors of single tokens do not tell that.
  """
  rng = np.random.default_rng(0)
  words = rng.normal(size=(VOCAB // 2, WIDTH))

  def meaning(ids):
    return unit(words[ids // 2].mean(axis=1))

  blocks = rng.integers(0, VOCAB, (CONFIG.blocks, BRANCHING)).astype(np.int32)
  asked = np.full((CONFIG.questions, 40), -1, np.int32)
  asked[:, :6] = rng.integers(0, VOCAB, (CONFIG.questions, 6))
  return Texts(blocks, meaning(blocks), asked, meaning(asked[:, :6]),
               unit(rng.normal(size=(VOCAB, WIDTH))))


def test_the_table_learns_which_words_mean_the_same():
  texts, held = key_distil.split(synonyms(), 100, 60)
  rows = key_distil.unit_rows(EMBEDDINGS)
  before = key_distil.start(texts, CONFIG, EMBEDDINGS)
  after = key_distil.train(texts, CONFIG, EMBEDDINGS)
  for name, value in before.items():
    assert np.abs(np.asarray(after[name]) - value).max() > 0, name
  first = key_distil.agreement(key_distil.tables(before, rows), held)
  known = key_distil.tables(after, rows)
  last = key_distil.agreement(known, held)
  assert last["of 8"] > first["of 8"] + 0.15
  assert last["reciprocal rank"] > 1.5 * first["reciprocal rank"]

  def likeness(tables):
    v = unit(np.asarray(tables.vectors))
    same = (v[0::2] * v[1::2]).sum(axis=1).mean()
    return same - (v[0:-2:2] * v[3::2]).sum(axis=1).mean()

  assert likeness(known) > likeness(key_distil.tables(before, rows)) + 0.3


def test_a_keyer_reads_the_table_as_the_training_does(tiny_lm):
  texts = synonyms()
  rows = key_distil.unit_rows(EMBEDDINGS)
  known = key_distil.tables(
    key_distil.start(texts, CONFIG, EMBEDDINGS), rows)
  config = lensnet.LensNetConfig(d_model=32, key_dim=8)
  params = lensnet.init_params(config)
  params[lens_keyer.TABLE] = key_distil.table(known)
  keyer = lens_keyer.LensKeyer(params, config, tiny_lm)
  assert keyer.key_dim == 16
  got = keyer.encode_keys(texts.blocks[:50]) / lensnet.KEY_SCALE
  want = np.asarray(key_distil._summed(known, 0, texts.blocks[:50]))
  np.testing.assert_allclose(got, np.clip(want, -0.5, 0.5), atol=0.02)
  ids = texts.questions[0][:6]
  query = keyer.query(ids, np.ones(6, np.float32)) / lensnet.KEY_SCALE
  want = np.asarray(key_distil._summed(known, 1, ids[None]))[0]
  np.testing.assert_allclose(query, np.clip(want, -0.5, 0.5), atol=0.02)
  padded = np.full((1, 40), -1, np.int32)
  padded[0, :32] = texts.blocks[0]
  np.testing.assert_array_equal(
    keyer.encode_keys(padded)[0], keyer.encode_keys(texts.blocks[:1])[0])
  heads = lens_keyer.LensKeyer({"keys": params["keys"]}, config, tiny_lm)
  assert heads.key_dim == 8 and heads.fingerprint != keyer.fingerprint


class Words:
  """A tokenizer of one word a token, and a teacher that counts its calls."""

  def __init__(self):
    self.calls = 0

  def decode(self, ids):
    return " ".join(f"W{i}" + "?" * (i % 9 == 0) for i in ids)

  def encode(self, text):
    return np.array([int(w.strip("W?")) for w in text.split()], np.int32)

  def _vector(self, text):
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(text))
    return np.random.default_rng(seed).normal(size=8)

  def vectors(self, texts, longest):
    self.calls += 1
    assert longest in (50, 26, 6)
    return unit(np.stack([self._vector(t) for t in texts]))


class Teacher:
  """`Words.vectors` as a `key_distil.Teacher`."""

  def __init__(self, words):
    self.encode = words.vectors


def test_what_was_read_is_not_read_again(tiny_stores, tmp_path):
  words = Words()
  config = KeyConfig(blocks=20, questions=10, near=4)

  def read():
    return key_distil.read(
      tiny_stores, words, VOCAB, Teacher(words), config, tmp_path)

  texts = read()
  assert words.calls == 3
  assert texts.blocks.shape == (20, 32) and len(texts.questions) >= 10
  assert texts.token_vectors.shape == (VOCAB, 8)
  again = read()
  assert words.calls == 3
  for a, b in zip(texts, again):
    np.testing.assert_array_equal(a, b)
  next(tmp_path.glob("questions-0000-*.npy")).unlink()
  read()
  assert words.calls == 4
  config = dataclasses.replace(config, seed=12)  # other texts are read
  read()
  assert words.calls == 6


def test_blocks_are_stretches_of_the_text(tiny_stores):
  spans = key_distil.draw_blocks(tiny_stores, KeyConfig(blocks=30, near=2))
  whole = [s.tokens for s in tiny_stores.values()]
  assert spans.shape == (30, 48)
  for span in spans:
    assert any((np.lib.stride_tricks.sliding_window_view(t, 48) == span).all(
      axis=1).any() for t in whole)


@pytest.mark.parametrize("changes,told", [
  ({"near": 70000}, "config.distil.near=70000"),
  ({"steps": 0}, "config.distil.steps must be ≥ 1"),
  ({"sleeps": 1}, "config.distil.sleeps is not a setting"),
])
def test_a_wrong_setting_is_named(changes, told):
  with pytest.raises(McjaxError, match=told):
    key_distil.read_config(changes)


def test_text_without_questions_is_told(tiny_stores):
  words = Words()
  words.decode = lambda ids: "Nothing is asked here."
  with pytest.raises(McjaxError, match="holds only 0 questions"):
    key_distil.draw_questions(tiny_stores, words, CONFIG)
  other = dataclasses.replace(CONFIG, block_mixture=(("law", 1.0),))
  assert len(key_distil.draw_blocks(tiny_stores, other)) == CONFIG.blocks
  with pytest.raises(McjaxError, match="kind prose has 64 tokens"):
    key_distil.draw_blocks({"prose": _Short()}, CONFIG)


class _Short:
  """A store of short documents."""

  offsets = np.array([0, 10, 30])
