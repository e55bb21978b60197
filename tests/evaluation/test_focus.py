"""Planted needs and the focus suite."""

import numpy as np
import pytest

from mcjax.evaluation import focus, planted
from mcjax.types import Entry, McjaxError


class Store:
  """Documents of a token store, in memory."""

  def __init__(self, documents):
    self._documents = documents
    self.names = [str(i) for i in range(len(documents))]

  def document(self, index):
    return self._documents[index]


def test_facts_are_where_plant_says():
  text = np.arange(1000, 2000, dtype=np.int32)
  facts = [np.arange(5 * i, 5 * i + 5, dtype=np.int32) for i in range(7)]
  ids, places = planted.plant(text, facts, seed=3)
  assert len(ids) == 1035
  for fact, (start, stop) in zip(facts, places):
    np.testing.assert_array_equal(ids[start:stop], fact)
  np.testing.assert_array_equal(ids[ids >= 1000], text)


def test_needs_are_reproducible_and_differ():
  needs = planted.draw(40, seed=1)
  assert needs == planted.draw(40, seed=1)
  assert len({n.question for n in needs}) == 40
  assert not set(needs) & set(planted.draw(40, seed=2))
  for need in needs:
    assert need.answer in need.fact and need.answer not in need.question


def test_covered_needs_every_token_at_l0():
  tiling = [Entry(0, i, i + 1) for i in range(32)] + [Entry(1, 32, 64)]
  assert focus.covered((3, 32), tiling)
  assert not focus.covered((30, 33), tiling)
  assert not focus.covered((40, 45), tiling)


def test_history_is_held_out_text_of_every_kind():
  stores = {k: Store([np.full(50, v, np.int32)] * 4)
            for k, v in (("code", 1), ("prose", 2))}
  ids = focus.history_of(stores, 120, 0, seed=0)
  assert len(ids) == 120 and set(ids.tolist()) == {1, 2}
  with pytest.raises(McjaxError, match="400 tokens, 900 are wanted"):
    focus.history_of(stores, 900, 0, seed=0)


def test_similarity_finds_what_random_focus_does_not(tiny_lm):
  rng = np.random.default_rng(0)
  words = [f"{a}{b}" for a in "bcdfgklm" for b in ("ade", "ilo", "umo", "ery")]
  text = " ".join(rng.choice(words, 12_000))
  ids = tiny_lm.tokenizer.encode(text)
  stores = {"prose": Store([ids] * 4)}
  settings = focus.Settings(
    history=12_000, histories=1, needs=5, window=512,
    policies=("similarity", "recency"), answers=False,
  )

  def retriever(texts, questions):  # counts shared words
    sets = [set(t.split()) for t in texts]
    return np.array([[len(set(q.split()) & s) for s in sets]
                     for q in questions], float)

  report = focus.measure(tiny_lm, stores, settings, retriever)
  value = {k: v.value for k, v in report.figures.items()}
  assert value["similarity/hit@budget"] >= 0.8
  assert value["recency/hit@budget"] == 0.0
  assert value["retriever/hit@budget"] > 0.0
  assert value["similarity/nodes touched per step"] <= 256
