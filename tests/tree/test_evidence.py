"""Which node is looked into first."""

import numpy as np
import pytest

from mcjax.tree.evidence import Evidence


def odds(evidence, level, *held):
  return evidence.log_odds(level, np.array(held, bool))


def counted(level, blocks, *held, times=1):
  evidence = Evidence(blocks)
  evidence.count(level, np.array(held * times, bool))
  return evidence


def test_a_feature_that_few_hold_tells_more_than_one_that_all_hold():
  few, many, none = (1, 1, 0), (0, 1, 1), (0, 1, 0)
  evidence = counted(3, 10**6, few, *[many] * 20, *[none] * 11)
  few, many, none = odds(evidence, 3, few, many, none)
  assert few > many > none


def test_what_all_hold_tells_nothing():
  """Saturated keys leave what was known before: the width of a node."""
  blocks = 32**4
  evidence = counted(4, blocks, *[(1,) * 5] * 10**6)
  (found,) = odds(evidence, 4, (1,) * 5)
  assert found == pytest.approx(np.log(32**3 / blocks), abs=1e-4)


def test_equals_the_probabilities_it_stands_for():
  """By drawing shares and features, as the model has them."""
  rng, held = np.random.default_rng(0), np.array([1, 0, 1], bool)
  evidence = counted(2, 320, *rng.random((64, 3)) < (0.1, 0.5, 0.8))
  counts = evidence._holders[2]
  p = (counts + 0.5) / 65
  draws = rng.random((400_000, 1))
  below = draws + (1 - draws) * p
  chance = np.where(held, below, 1 - below).prod(1).mean()
  without = np.where(held, p, 1 - p).prod()
  expected = np.log(chance / without) - np.log(10)
  assert odds(evidence, 2, held)[0] == pytest.approx(expected, abs=0.02)


def test_says_when_the_count_has_doubled():
  evidence, row = Evidence(100), np.zeros((32, 2), bool)
  said = [evidence.count(2, row) for _ in range(8)]
  assert said == [True, True, False, True, False, False, False, True]
  assert evidence.count(3, row)  # another level, another count


def test_of_no_features_only_the_width_counts():
  evidence = counted(2, 320, *[()] * 3)
  np.testing.assert_allclose(odds(evidence, 2, (), ()), -np.log(10))
