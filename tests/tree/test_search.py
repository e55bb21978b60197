"""TreeSearch against brute force, and its bounds on work."""

import uuid

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.testing.tree_reference import (
  BASE,
  VOCAB,
  TinyEncoder,
  TinyKeyer,
  random_ids,
)
from mcjax.tree import learned_keys as lens_keys
from mcjax.tree import lexical_keys as keys
from mcjax.tree import lexical_rank
from mcjax.tree.search import TreeSearch, by_keys, by_words
from mcjax.tree.search import brute_force as scan
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_TREES = {}


def tree_of(n, seed=0):
  """A tree of n random tokens, kept for the next test."""
  if (n, seed) not in _TREES:
    tree = MegaContextTree.create(
      f"memory://search-{uuid.uuid4()}", encoder=TinyEncoder(d_model=1),
      vocab_size=VOCAB, **BASE,
    )  # fmt: skip
    tree.append(random_ids(n, seed))
    _TREES[n, seed] = tree
  return _TREES[n, seed]


def roots(blocks):
  """(level, first, last) of the maximal complete nodes, oldest first."""
  level = 1
  while blocks // 32**level:
    level += 1
  done = 0
  for at in range(level, 0, -1):
    last = blocks // 32 ** (at - 1)
    yield at, done // 32 ** (at - 1), last
    done = last * 32 ** (at - 1)


def brute_force(tree, score, blocks):
  """Every (block, score), best first, ties newer first."""
  scores = np.full(blocks, np.inf)
  for top, first, last in roots(blocks):
    for level in range(top, 0, -1):
      width = 32 ** (level - 1)
      low, high = first * 32 ** (top - level), last * 32 ** (top - level)
      if low < high:
        own = np.repeat(score(tree.keys(level, low, high)), width)
        part = slice(low * width, high * width)
        scores[part] = np.minimum(scores[part], own)
  order = np.lexsort([-np.arange(blocks), -scores])
  return [(int(b), float(scores[b])) for b in order]


def words_of(seed, n=6):
  rng = np.random.default_rng(seed)
  return rng.integers(0, VOCAB, n), rng.integers(0, 4, n)


def query_of(seed, n=6):
  return keys.scorer(*words_of(seed, n))


@settings(max_examples=60, deadline=None)
@given(
  st.sampled_from([0, 31, 32, 500, 1024, 1500, 5000, 33_000, 40_000]),
  st.integers(0, 10_000),
  st.sampled_from([1, 4, 16, 100]),
  st.sampled_from([32, 64, 256, 10**6]),
)
def test_equals_brute_force_when_it_may_go_on(n, seed, k, max_nodes):
  tree, score = tree_of(n), query_of(seed)
  search = by_words(tree, *words_of(seed), k=k)
  runs = 0
  while not search.certified:
    search.run(max_nodes)
    runs += 1
    assert runs < 10**4
  every = brute_force(tree, score, n // 32)
  assert search.best(k) == [(b, s) for b, s in every if s > 0][:k]
  touched = search.touched
  search.run(max_nodes)
  assert search.touched == touched


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 1300))
def test_stop_block_hides_the_newest_blocks(seed, stop):
  tree, score = tree_of(40_000), query_of(seed)
  search = by_words(tree, *words_of(seed), k=8, stop_block=stop)
  search.run(10**6)
  stop = min(stop, 1250)
  every = brute_force(tree, score, stop)
  assert search.certified
  assert search.best(8) == [(b, s) for b, s in every if s > 0][:8]


def test_negative_scores_with_a_floor():
  tree = tree_of(5000)
  search = TreeSearch(tree, lambda k: -np.ones(len(k)), k=3, floor=-np.inf)
  search.run(10**6)
  assert search.best(3) == [(155, -1.0), (154, -1.0), (153, -1.0)]


def test_work_per_run_is_bounded_and_the_same_for_any_history():
  work = []
  for n in (10_000, 300_000):
    tree, most = tree_of(n), []
    for seed in range(5):
      search = by_words(tree, *words_of(seed, 20), k=1000)
      for _ in range(2):
        before = search.touched, search.bytes_read, tree.reads
        search.run(256)
        touched = search.touched - before[0]
        assert 0 < touched <= 256
        assert tree.reads["keys"] - before[2]["keys"] == touched
        assert tree.reads["tokens"] == before[2]["tokens"]
        assert search.bytes_read - before[1] <= 256 * keys.key_dim(3)
        most.append(touched)
    work.append(max(most))
  assert work[0] == pytest.approx(work[1], abs=32)


def test_finds_a_planted_fact_within_a_run_and_reads_no_more_once_certain():
  ids = random_ids(100_000, 3) % 250
  ids[71_300:71_304] = [270, 280, 290, 299]
  tree = MegaContextTree.create(
    f"memory://search-{uuid.uuid4()}", encoder=TinyEncoder(d_model=1),
    vocab_size=VOCAB, **BASE,
  )  # fmt: skip
  tree.append(ids)
  query = np.array([1, 270, 280, 290, 2])
  weights = lexical_rank.query_weights(tree, query, np.ones(5))
  search = by_words(tree, query, weights, k=1)
  search.run(256)
  assert search.best(1)[0][0] == 71_300 // 32
  assert search.certified and search.touched < 256


def test_what_few_nodes_hold_leads_the_way():
  """High up nearly all words are everywhere, and bounds lead nowhere."""
  tree, found = tree_of(40_000), np.zeros(2, int)
  for seed in range(10):
    rng, blocks = np.random.default_rng(seed), tree.num_nodes(1)
    planted = int(rng.integers(1024))
    own = rng.random((blocks, 32)) < 0.05
    own[:, -2:] = False
    own[planted, -2:] = True  # rare, and of no more weight than the others

    def read(level, first, last, own=own):
      width = 32 ** (level - 1)
      rows = own[first * width : last * width]
      return rows.reshape(-1, width, rows.shape[1]).any(1)

    for way, features in enumerate((lambda held: held, None)):
      search = TreeSearch(
        tree, lambda held: held.sum(1), features=features, read_keys=read)
      search.run(224)
      found[way] += planted in [b for b, _ in search.best(blocks)]
  assert found[0] == 10 > found[1] + 7


def test_a_query_that_nothing_holds_costs_one_look_at_the_roots():
  search = TreeSearch(tree_of(40_000), keys.scorer(np.array([7]), np.zeros(1)))
  search.run(256)
  assert search.certified and search.best(5) == [] and search.touched < 32 * 3


def test_a_run_needs_room_for_one_chunk():
  with pytest.raises(ValueError, match="32"):
    TreeSearch(tree_of(500), query_of(0)).run(31)


# Over lens keys.

_KEY_DIM = 4


def lens_tree_of(n, spread):
  """As `tree_of`, with lens keys in -spread..spread."""
  if (n, "lens", spread) not in _TREES:
    tree = MegaContextTree.create(
      f"memory://search-{uuid.uuid4()}", encoder=TinyEncoder(d_model=1),
      vocab_size=VOCAB, keyer=TinyKeyer(_KEY_DIM, spread=spread), **BASE,
    )  # fmt: skip
    tree.append(random_ids(n))
    _TREES[n, "lens", spread] = tree
  return _TREES[n, "lens", spread]


@settings(max_examples=80, deadline=None)
@given(
  st.sampled_from([0, 31, 32, 500, 1500, 5000, 33_000, 40_000]),
  st.sampled_from([1, 127]),  # 1: many ties
  st.lists(st.integers(-9, 9), min_size=_KEY_DIM, max_size=_KEY_DIM),
  st.sampled_from([1, 4, 16, 100]),
  st.sampled_from([None, 0, 1, 33, 700, 1249]),
  st.sampled_from([32, 256, 10**6]),
)
def test_lens_search_equals_brute_force(n, spread, query, k, stop, max_nodes):
  tree = lens_tree_of(n, spread)
  score = lens_keys.scorer(np.array(query))
  search, runs = by_keys(tree, np.array(query), k=k, stop_block=stop), 0
  while not search.certified:
    search.run(max_nodes)
    runs += 1
    assert runs < 10**4
  blocks = n // 32 if stop is None else min(n // 32, stop)
  own = tree.lens_keys(1, 0, blocks).astype(int) @ np.array(query)
  every = sorted(zip(own.tolist(), range(blocks)), reverse=True)[:k]
  assert search.best(k) == [(b, s) for s, b in every]
  assert search.best(k) == scan(tree, score, k=k, stop_block=stop)


def test_brute_force_in_several_chunks(monkeypatch):
  tree, score = lens_tree_of(40_000, 127), lens_keys.scorer(np.arange(-2, 2))
  at_once = scan(tree, score, k=40)
  monkeypatch.setattr("mcjax.tree.search._SCAN", 37)
  before = tree.reads
  assert scan(tree, score, k=40) == at_once
  assert tree.reads["lens"] - before["lens"] == 1250
  assert tree.reads["keys"] == before["keys"]
  with pytest.raises(McjaxError, match="no lens keys"):
    scan(tree_of(500), score)


def test_lens_search_counts_the_bytes_of_lens_keys():
  tree = lens_tree_of(1024 * 32, 127)  # one root of level 3
  search = by_keys(tree, np.arange(-2, 2), k=1)
  search.run(33)
  assert search.touched == 33 and search.bytes_read == 33 * 2 * _KEY_DIM


@pytest.mark.parametrize("bound", [-50.0, 50.0])
def test_of_equal_bounds_the_finer_node_is_read_first(bound):
  """A coarse bound is the looser one, below zero as above."""
  tree, order = tree_of(40_000), []

  def read(level, first, last):
    order.append(level)
    return np.full((last - first, 1), bound)

  search = TreeSearch(
    tree, lambda k: k[:, 0], k=10**4, floor=-np.inf, read_keys=read
  )
  search.run(64 + 32 * 3)
  assert order[:3] == [1, 2, 3]  # the roots, newest first
  assert set(order[3:]) == {1}


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_block_is_found_though_every_score_is_negative(seed):
  tree = lens_tree_of(40_000, 127)
  rng, blocks = np.random.default_rng(seed), tree.num_nodes(1)
  planted = int(rng.integers(blocks))
  own = rng.integers(-1000, -900, blocks).astype(float)
  own[planted] = -5

  def read(level, first, last):
    width = 32 ** (level - 1)
    return own[first * width : last * width].reshape(-1, width)

  search = TreeSearch(
    tree, lambda k: k.max(axis=1), k=1, floor=-np.inf, read_keys=read
  )
  search.run(256)
  assert search.certified and search.best(1) == [(planted, -5.0)]
