"""Answers lean on what the LM reads, against what it says without it."""

import numpy as np
import pytest
from runtime_cases import QUESTION, spans, with_fact

from mcjax import Config, McjaxError
from mcjax.runtime.telemetry import compile_count
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING
from mcjax.window.row_cache import prior_slots


@pytest.fixture
def make(make):
  return lambda **config: with_fact(
    make(gist_attention="masked", **config), 8_000, 3_000)


def log_softmax(logits):
  shifted = logits - logits.max()
  return shifted - np.log(np.exp(shifted).sum())


def plain(lm, ids):
  """Log probabilities [V] of what follows ids, a plain forward."""
  x = np.asarray(lm.params["embed"])[np.asarray(ids)]
  return log_softmax(tiny_base.plain_logits(lm, x, np.arange(len(ids)))[-1])


def answer(mc, out, weight, room=1000):
  """The greedy answer by definition, from plain forwards alone.

  Without the text, at most `room` of the newest tokens are read.
  """
  lm, tree = mc.lm, mc.tree
  count = len(out.token_ids)
  prompt = tree.tokens(mc.cursor - count - out.prompt_tokens,
                       mc.cursor - count).tolist()
  first = tree.tokens(0, 1).tolist()
  places = sorted({t for a, b in spans(out) for t in range(a, b)})
  read = [int(tree.tokens(t, t + 1)[0]) for t in places]
  told: list[int] = []
  for _ in range(count):
    beside = plain(lm, first + read + prompt + told)
    without = plain(lm, first + (prompt + told)[-room - len(told):])
    score = beside + weight * (beside - without)
    score[beside < beside.max() + np.log(0.1)] = -np.inf
    told.append(int(score.argmax()))
  return told


@pytest.mark.parametrize("kv, weight", [
  ("splice", 0.5), ("exact", 3.0),
  pytest.param("splice", 3.0, marks=pytest.mark.slow)])
def test_an_answer_is_what_the_text_makes_likelier(make, kv, weight):
  mc = make(kv=kv, contrast=weight, refresh_every=1)
  for question in (QUESTION, "the PUMP CODE, what is it?"):
    out = mc.generate(question, max_new_tokens=45)  # over a refocus step
    assert out.sources
    assert out.token_ids.tolist() == answer(mc, out, weight)


def test_of_a_long_prompt_the_newest_is_held_against(make):
  mc = make(contrast=3.0)
  out = mc.generate("?" * 150 + QUESTION, max_new_tokens=40)
  count = BRANCHING - (mc.cursor - len(out.token_ids)) % BRANCHING
  room = prior_slots(mc.config.window + BRANCHING) - BRANCHING - 1
  assert room < 150 and out.sources
  expected = answer(mc, out, 3.0, room)  # for as long as nothing leaves
  assert out.token_ids.tolist()[:count] == expected[:count]
  assert answer(mc, out, 3.0)[:count] != expected[:count]


def test_without_weight_or_sources_nothing_changes(make):
  plain_one, zero, more = make(contrast=0), make(contrast=1e-9), make(
    contrast=3.0)
  told = [mc.generate(QUESTION, max_new_tokens=40, remember=False).token_ids
          for mc in (plain_one, zero, more)]
  np.testing.assert_array_equal(told[0], told[1])
  assert told[2].tolist() != told[0].tolist()
  told = [mc.generate("~~~", max_new_tokens=8) for mc in (plain_one, more)]
  assert not told[0].sources  # nothing answers that
  np.testing.assert_array_equal(*(out.token_ids for out in told))


def test_it_costs_the_prompt_and_the_answer_once_more(make):
  runs = []
  for weight in (0.0, 0.5):
    mc = make(contrast=weight)
    mc.generate("~~~", max_new_tokens=1)
    before = mc._loop.context.tokens_run
    mc.generate(QUESTION, max_new_tokens=5)
    runs.append(mc._loop.context.tokens_run - before)
  assert runs[1] - runs[0] == 1 + len(QUESTION) + 5


def test_nothing_compiles_for_another_question(make):
  mc = make()
  mc.generate("~~~", max_new_tokens=40)  # nothing is read for it
  before = compile_count()
  for extra in (0, 30, 90):
    out = mc.generate("PUMP CODE? " + "?" * extra, max_new_tokens=70)
    assert out.sources
  assert compile_count() == before


def test_a_forgotten_question_leaves_nothing(make):
  mc, other = make(), make()
  mc.generate("the PUMP CODE, what is it?", max_new_tokens=40, remember=False)
  a, b = (m.generate(QUESTION, max_new_tokens=40) for m in (mc, other))
  np.testing.assert_array_equal(a.token_ids, b.token_ids)


def test_a_negative_weight_is_refused():
  with pytest.raises(McjaxError, match="config.contrast must be >= 0"):
    Config(contrast=-0.5)
