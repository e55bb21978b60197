"""Bootstrap intervals."""

import numpy as np
import pytest

from mcjax.evaluation.report import intervals


def test_a_mean_covers_its_truth_about_as_often_as_said():
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(100):
    found = intervals.of_mean(rng.normal(1.0, 2.0, 60))
    covered += found.low <= 1.0 <= found.high
  assert 87 <= covered <= 100


def test_groups_are_drawn_as_a_whole():
  values = np.repeat([0.0, 1.0, 0.0, 1.0], 25)
  groups = np.repeat(list("abcd"), 25)
  alone = intervals.of_mean(values)
  together = intervals.of_mean(values, groups)
  assert together.high - together.low > 2 * (alone.high - alone.low)
  assert alone.value == together.value == pytest.approx(0.5)
  assert alone.n == 100


def test_pairs_take_out_what_they_share():
  rng = np.random.default_rng(1)
  hard = rng.normal(0, 5, 40)
  found = intervals.of_difference(hard + 1, hard)
  assert found.low == pytest.approx(1) and found.high == pytest.approx(1)


def test_what_is_missing_is_left_out():
  assert intervals.of_mean([]) is None
  assert intervals.of_mean([float("nan")]) is None
  assert intervals.of_mean([1.0, float("nan")]).n == 1


def test_the_same_seed_gives_the_same_interval():
  values = np.random.default_rng(2).normal(size=30)
  assert intervals.of_mean(values) == intervals.of_mean(values)


def test_a_ratio_is_of_means_drawn_together():
  some, others = [1.0, 0.0, 2.0, 1.0], [1.0, 1.0, 2.0, 4.0]
  found = intervals.of_ratio(some, others)
  assert found.value == 0.5 and found.n == 4
  assert found.low < 0.5 < found.high
  same = intervals.of_ratio(others, others, ["a", "a", "b", "b"])
  assert same[:3] == (1.0, 1.0, 1.0)
  assert intervals.of_ratio([1.0], [0.0]) is None
