"""The fit of the choice of sentences: on what it is told, and resumable."""

import numpy as np
import pytest

from mcjax.lens.sentence_features import FEATURES, MOST, NAMES
from mcjax.training.lens import sentences
from mcjax.training.lens.sentences import ReaderFit, SentenceSet
from mcjax.training.lens.trainer import LensTrainConfig
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


@pytest.mark.parametrize("span, told", [
  ((0, 10), 1.0),  # all of it is marked
  ((0, 40), 1.0),  # it holds all that is marked, and more
  ((4, 14), 0.6),  # six of its tokens, six of ten that are marked
  ((8, 108), 0.2),  # two of the ten
  ((10, 20), 0.0),
])
def test_a_long_sentence_that_holds_a_whole_fact_tells_it(span, told):
  assert sentences.marked([span], [(0, 10)]) == pytest.approx(told)


def test_a_sentence_of_a_long_answer_tells_it():
  spans = [(120, 140), (190, 210), (300, 320)]
  np.testing.assert_allclose(
    sentences.marked(spans, [(100, 200)]), [1.0, 0.5, 0.0])
  np.testing.assert_allclose(  # two marks meet in it
    sentences.marked([(190, 210)], [(100, 200), (205, 400)]), [0.75])


def test_no_history_teaches_both_scores_and_the_choice_of_sentences():
  assert ReaderFit().seed != LensTrainConfig().seed


def test_nothing_to_learn_from_is_told():
  some = built(5)
  some.tells[:] = 0
  with pytest.raises(McjaxError, match="nothing to fit"):
    sentences.fit({"a": some}, {"a": 1.0}, ReaderFit(steps=1))
  with pytest.raises(McjaxError, match="config.fit.steps"):
    ReaderFit(steps=0)
