"""Lexical keys: bounds, scores and reranking."""

import uuid

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.testing.tree_reference import BASE, VOCAB, TinyEncoder, random_ids
from mcjax.tree import lexical_keys as keys
from mcjax.tree import lexical_rank
from mcjax.tree.tree import MegaContextTree

IDS = st.integers(0, 60)


def tree_of(ids):
  tree = MegaContextTree.create(
    f"memory://keys-{uuid.uuid4()}", encoder=TinyEncoder(), vocab_size=VOCAB,
    **BASE,
  )  # fmt: skip
  tree.append(ids)
  return tree


def test_sketch_has_a_bit_for_each_token_and_pair():
  spans = np.array([[-1, 5, 9], [5, 9, 5], [-1, -1, -1]])
  found = np.unpackbits(keys.sketch(spans, 1), axis=1).sum(axis=1)
  assert found.tolist() == [3, 4, 0]
  assert keys.sketch(spans, 3).shape == (3, keys.key_dim(3))


@settings(max_examples=50, deadline=None)
@given(st.lists(IDS, min_size=2, max_size=12), st.data())
def test_a_key_bounds_the_true_score_at_every_level(query, data):
  query = np.array(query)
  weights = data.draw(
    st.lists(st.floats(0, 9), min_size=len(query), max_size=len(query)).map(
      np.array
    )
  )
  span = np.array(data.draw(st.lists(IDS, min_size=1, max_size=60)))
  true = sum(max(weights[query == token]) for token in set(query) & set(span))
  pairs = set(zip(span[:-1], span[1:], strict=True))
  for pair in set(zip(query[:-1], query[1:], strict=True)) & pairs:
    at = (query[:-1] == pair[0]) & (query[1:] == pair[1])
    true += keys.PAIR * np.minimum(weights[:-1], weights[1:])[at].max()
  score = keys.scorer(query, weights)
  for level in (1, 2, 3):
    bound = score(keys.sketch(span[None], level))[0]
    assert bound >= true - 0.02
  assert bound <= true + 0.02  # the widest key: no collision of 60 tokens


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3))
def test_a_union_never_scores_less_than_its_children(seed, level):
  rng = np.random.default_rng(seed)
  spans = rng.integers(0, VOCAB, (64, 48))
  children = keys.sketch(spans, level)
  parents = keys.union(children.reshape(2, 32, -1))
  score = keys.scorer(rng.integers(0, VOCAB, 20), rng.random(20))
  best = score(children).reshape(2, 32).max(axis=1)
  assert (score(parents) >= best).all()
  np.testing.assert_array_equal(
    score(children), [score(child[None])[0] for child in children]
  )


def test_few_false_positives():
  rng = np.random.default_rng(0)
  for level, tokens in ((1, 48), (2, 1024), (3, 2048)):
    spans = rng.integers(0, 20_000, (4, tokens))
    query = rng.integers(20_000, 40_000, 400)
    score = keys.LexicalScorer(query, np.ones(400), pair_weight=0)
    rate = score(keys.sketch(spans, level)).mean() / len(set(query))
    assert rate < (0.03, 0.15, 0.05)[level - 1]


def test_query_weights_fall_with_the_number_of_blocks():
  ids = np.concatenate([np.full(64, 1), random_ids(960) % 200 + 3])
  ids[64::32] = 3
  ids[100] = 250
  tree = tree_of(ids)
  weights = lexical_rank.query_weights(
    tree, np.array([250, 1, 3, 299]), np.ones(4))
  assert weights.dtype == np.float32
  assert weights[0] > weights[1] > weights[2] >= 0 == weights[3]
  half = lexical_rank.query_weights(tree, np.array([250]), np.array([0.5]))
  assert half[0] == pytest.approx(weights[0] / 2)
