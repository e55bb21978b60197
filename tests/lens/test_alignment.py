"""Alignment: agreement position by position, and what came next."""

import numpy as np
import pytest

from mcjax.lens import alignment
from mcjax.lens.alignment import SPAN
from mcjax.types import BRANCHING


class TokensOnly:
  """A tree of which only tokens are read."""

  def __init__(self, ids):
    self._ids = np.asarray(ids)

  def tokens(self, start, stop):
    assert 0 <= start <= stop <= len(self._ids)
    return self._ids[start:stop]


def test_span_weights_prefer_rare_and_new_tokens():
  weights = alignment.span_weights(np.array([1.0] * 17 + [2.0]))
  assert weights.sum() == pytest.approx(1)
  assert weights[0] == pytest.approx(weights[16] / 2)
  assert weights[17] > 2 * weights[16]
  assert alignment.span_weights(np.zeros(3)).tolist() == [0, 0, 0]


def test_agreements_by_hand():
  got = alignment.agreements(
    np.array([7, 1, 2, 3, 1, 9, 3]), np.array([1, 2, 3]),
    np.array([0.2, 0.3, 0.5]))
  np.testing.assert_allclose(got, [0, 1, 0, 0, 0.7])
  assert not len(alignment.agreements(np.arange(2), np.arange(3), np.ones(3)))


@pytest.mark.parametrize("offset", [0, 1, 17, 31])
def test_what_followed_a_repeated_passage_is_found(offset):
  rng = np.random.default_rng(offset)
  ids = rng.integers(0, 1000, 20 * BRANCHING)
  newest = rng.integers(0, 1000, SPAN)
  end = 6 * BRANCHING + offset  # of the passage; what follows begins here
  ids[end - SPAN : end] = newest
  ids[end - 9] = 5000  # a token differs
  weights = alignment.span_weights(np.ones(SPAN))
  last = (end - 1) // BRANCHING  # holds the passage's last token
  got = alignment.continuations(
    TokensOnly(ids), range(20), newest, weights, len(ids))
  share = 1 - weights[SPAN - 9]
  strong = {b: s for b, s in got.items() if s > 0.2}
  follow = {6} if offset == 0 else {6, 7}
  assert strong == pytest.approx(dict.fromkeys(follow, share))
  # one candidate is enough, and nothing beyond `stop` is asked for
  assert alignment.continuations(
    TokensOnly(ids), [last], newest, weights, len(ids)
  ) == pytest.approx(dict.fromkeys(follow, share))
  cut = 7 * BRANCHING
  near = alignment.continuations(
    TokensOnly(ids[:cut]), [last], newest, weights, cut)
  assert set(near) == {6}


def test_a_history_shorter_than_the_span_has_no_passages():
  weights = alignment.span_weights(np.ones(SPAN))
  assert alignment.continuations(
    TokensOnly(np.zeros(32, int)), [0], np.zeros(SPAN, int), weights, 32) == {}
