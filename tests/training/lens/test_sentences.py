"""The fit of the choice of sentences: on what it is told, and resumable."""

import numpy as np
import pytest

from mcjax.lens.sentence_features import FEATURES, MOST, NAMES
from mcjax.training.lens import sentences
from mcjax.training.lens.sentences import ReaderFit, SentenceSet
from mcjax.types import McjaxError

SHARE, LENGTH = NAMES.index("share"), NAMES.index("length")


def built(count, seed=0, sign=1.0):
  """Questions whose answer is the sentence of the largest `share`."""
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(count, MOST, FEATURES)).astype(np.float16)
  tells = np.zeros((count, MOST), np.float16)
  span = np.zeros((count, MOST, 2), np.int32)
  for i in range(count):
    size = int(rng.integers(4, 12))
    span[i, :size] = np.arange(2 * size).reshape(size, 2) * 10 + [0, 10]
    best = int(np.argmax(sign * features[i, :size, SHARE]))
    tells[i, best] = 1.0
    features[i, best, SHARE] += sign
  return SentenceSet(features, tells, span)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_fit_learns_what_tells(sign):
  train, held_out = built(400, 0, sign), built(80, 1, sign)
  params = sentences.fit(
    {"a": train}, {"a": 1.0}, ReaderFit(steps=400, hidden=4),
    report=lambda line: None)
  found = sentences.evaluate(params, held_out, most=20, least=0.5)
  assert found["first"] > 0.8 and found["known"] == 1.0
  assert found["read"] >= found["first"] and found["tokens"] <= 20


def test_kinds_without_a_share_teach_nothing():
  good, other = built(100), built(100, 1, -1.0)
  both = sentences.fit(
    {"good": good, "other": other}, {"good": 1.0}, ReaderFit(steps=150),
    report=lambda line: None)
  alone = sentences.fit({"good": good}, {"good": 1.0}, ReaderFit(steps=150),
                        report=lambda line: None)
  np.testing.assert_array_equal(both["linear"]["kernel"],
                                alone["linear"]["kernel"])


def test_nothing_to_learn_from_is_told():
  some = built(5)
  some.tells[:] = 0
  with pytest.raises(McjaxError, match="nothing to fit"):
    sentences.fit({"a": some}, {"a": 1.0}, ReaderFit(steps=1))
  with pytest.raises(McjaxError, match="config.fit.steps"):
    ReaderFit(steps=0)
