"""Focus policies: what each asks for, and that similarity finds what is asked.
"""

import dataclasses

import marks
import numpy as np
import pytest
from runtime_cases import spans

from mcjax import Config, McjaxError, MegaContext
from mcjax.focus.controls import Random
from mcjax.focus.oracle import Oracle
from mcjax.focus.policy import age_scores
from mcjax.focus.similarity import Similarity
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING
from mcjax.window.focus_view import fading_weights
from mcjax.window.working_context import COLLAPSE, EXPAND

FACTS = {
  30_000: "THE PUMP CODE IS 7314.",
  12_000: "KAI SOLHEIM IS CHIEF PILOT.",
}


def make(tiny_lm, tiny_gistnet, **config):
  return MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(**{"window": 512, "recent_tokens": 64, "gists_per_level": 8,
              **config}),
    gistnet=tiny_gistnet,
  )


@pytest.fixture
def planted(tiny_lm, tiny_gistnet):
  """40,000 lower-case tokens with the facts in upper case."""
  text = tiny_base.text(40_000, 3)
  for at, fact in FACTS.items():
    text = text[:at] + fact + text[at + len(fact) :]
  mc = make(tiny_lm, tiny_gistnet)
  mc.ingest(text)
  yield mc
  mc.close()


def view_of(mc, **changes):
  return dataclasses.replace(mc._loop.view(), asked=True, **changes)


def levels_at(focus, start, stop):
  """Levels at which tokens [start, stop) are seen."""
  return {e.level for e in focus if e.start < stop and e.stop > start}


def seen_raw(focus, at):
  """Whether the fact at a character (token, behind BOS) is at L0."""
  return levels_at(focus, at + 1, at + 1 + len(FACTS[at])) == {0}


# --- Similarity --------------------------------------------------------------


def test_similarity_finds_shifts_and_returns(planted):
  """From one part of the history to another and back; focus only."""
  pump, pilot = FACTS
  questions = {
    pump: "what is the PUMP CODE?", pilot: "who is CHIEF PILOT?",
  }
  assert not seen_raw(planted.focus(), pump)
  assert not seen_raw(planted.focus(), pilot)
  for at in (pump, pilot, pump):
    steps = planted.telemetry.counters["refocus_steps"]
    out = planted.generate(questions[at], max_new_tokens=1)
    steps = planted.telemetry.counters["refocus_steps"] - steps
    assert seen_raw(out.focus, at), "the answer begins without the fact"
    assert steps <= 8 + 2  # settling, and room for the prompt
    assert planted.telemetry.counters["nodes_touched"] > 0


def test_similarity_collapses_what_is_no_longer_asked(planted):
  pump, pilot = FACTS
  planted.generate("what is the PUMP CODE?", max_new_tokens=1)
  for _ in range(4):
    focus = planted.generate("who is CHIEF PILOT?\n", 40).focus
  assert seen_raw(focus, pilot) and not seen_raw(focus, pump)


def test_the_question_itself_is_no_answer(planted):
  """Asking twice must not find the first asking instead of the fact."""
  pump, _ = FACTS
  for _ in range(3):
    out = planted.generate("what is the PUMP CODE?", max_new_tokens=1)
    assert seen_raw(out.focus, pump)


def test_asked_again_the_fact_is_read_and_no_earlier_exchange(
  tiny_lm, tiny_gistnet
):
  """However often: the question fills the search's best places by then."""
  fact = "THE PUMP CODE IS 7314."
  chat = dataclasses.replace(
    tiny_lm, tokenizer=tiny_base.byte_tokenizer(chat=True))
  mc = make(chat, tiny_gistnet)
  around = tiny_base.text(9_000, 3), tiny_base.text(9_000, 4)
  mc.ingest(f"{around[0]}\n{fact}\n{around[1]}")
  for _ in range(12):
    out = mc.generate("what is the PUMP CODE?", max_new_tokens=1)
    assert [mc.text(a, b).strip() for a, b in spans(out)] == [fact]
  mc.close()


def test_work_per_step_is_bounded(planted):
  policy = Similarity(max_nodes=64)
  ids = planted.lm.tokenizer.encode("PUMP CODE")
  view = view_of(
    planted, query_ids=ids, query_weights=np.ones(len(ids), np.float32),
    query_start=planted.cursor,
  )
  touched = 0
  for _ in range(60):
    reads = sum(planted.tree.reads.values())
    targets = policy.targets(view)
    assert policy.touched <= 64
    # Blocks are read as words once, with those beside them.
    assert sum(planted.tree.reads.values()) - reads < 64 + 32 * 5 * 3 * 48
    touched += policy.touched
  assert touched > 64, "it goes on where it stopped"
  fact = (30_000 + 1) // BRANCHING
  assert targets[0][0] in (fact, fact + 1)
  assert all(0.2 < strength <= 1 for _, strength in targets)


def test_no_query_asks_for_nothing(planted):
  policy = Similarity(max_nodes=64)
  for ids in (np.zeros(0, np.int32), np.array([290, 291], np.int32)):
    view = view_of(
      planted, query_ids=ids, query_weights=np.ones(len(ids), np.float32),
      query_start=planted.cursor,
    )
    assert policy.targets(view) == []
    np.testing.assert_array_equal(
      policy.score(view), age_scores(view)
    )


# --- The controls ------------------------------------------------------------


def test_age_scores_move_nothing_of_their_own(planted):
  calm = age_scores(view_of(planted))
  assert calm.dtype == np.float32
  assert (-0.2 < calm).all() and (calm <= 0).all()
  assert (np.diff(calm) >= 0).all(), "older is lower"


def test_recency_never_expands_and_collapses_the_oldest(tiny_lm, tiny_gistnet):
  mc = make(tiny_lm, tiny_gistnet, policy="recency")
  mc.ingest(tiny_base.text(300))
  mc.generate("on", max_new_tokens=400)
  count = mc.telemetry.counters
  assert count["expands"] == 0 and count["collapses"] >= 6
  levels = [e.level for e in mc.focus()]
  assert levels[:32] == [0] * 32  # the sink
  coarse = [k for k, level in enumerate(levels) if level]
  assert coarse == list(range(32, 32 + len(coarse)))
  mc.close()


def test_random_is_uniform_and_seeded(planted):
  view = view_of(planted)
  first, same, other = (
    Random(seed).score(view) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, same)
  assert not np.array_equal(first, other)
  many = np.concatenate([Random(s).score(view) for s in range(30)])
  assert many.dtype == np.float32 and np.abs(many).max() <= 1
  assert abs(many.mean()) < 0.03 and abs(many.std() - 3**-0.5) < 0.02


@pytest.mark.parametrize("count", [1, 64, 128])
def test_fading_weights(count):
  weights = fading_weights(count)
  assert weights.shape == (count,) and weights[-1] == 1
  if count > 64:
    np.testing.assert_allclose(weights[-65], 0.5)
  assert (np.diff(weights) > 0).all()


# --- The oracle --------------------------------------------------------------


def nll_after(mc, action, at, continuation):
  """Mean NLL behind an edit that is really made, spliced and scored."""
  loop = mc._loop
  with loop.undone():
    window = loop.context.window
    if action == EXPAND:
      window.expand(at, loop.step)
    elif action == COLLAPSE:
      window.collapse(at, loop.step)
    loop.remember(continuation)
    window.append_tokens(window.take_slots(len(continuation)))
    loop.context.load_unready(mc.tree)
    loop.context.sync(renew=len(continuation) + 1)
    return float(np.mean(loop.context.newest_nll(continuation)))


@pytest.mark.parametrize(
  "shown", ["visible", *marks.further("masked")])
def test_the_oracle_scores_by_making_the_edit(tiny_lm, tiny_gistnet, shown):
  mc = make(tiny_lm, tiny_gistnet, policy="oracle", gist_attention=shown)
  mc.ingest(tiny_base.text(1500))
  mc._loop.context.window.expand(33, step=-9)  # something to collapse
  mc.next_logits()
  continuation = mc.lm.tokenizer.encode(tiny_base.text(32, 8))
  view = view_of(mc, continuation=continuation)
  scores = Oracle(mc.config).score(view)
  plain = age_scores(view)
  base = nll_after(mc, 0, 0, continuation)
  entries = mc._loop.context.window.entries
  expands = collapses = 0
  for at in np.flatnonzero(scores != plain):
    if entries.level[at] > 0:
      change = nll_after(mc, EXPAND, at, continuation) - base
      np.testing.assert_allclose(
        scores[at], np.tanh(-10 * change), atol=1e-3
      )
      expands += 1
    elif entries.index[at] % BRANCHING == 0:
      change = nll_after(mc, COLLAPSE, at, continuation) - base
      np.testing.assert_allclose(
        scores[at], np.tanh(10 * (change - 0.02)), atol=1e-3
      )
      collapses += 1
  assert expands >= 3 and collapses >= 1
  mc.close()


def test_the_oracle_needs_the_continuation(planted):
  with pytest.raises(McjaxError, match="true continuation"):
    Oracle(planted.config).score(view_of(planted))


@pytest.mark.slow
def test_the_oracle_scores_long_texts_too(tiny_lm, tiny_gistnet):
  """The window fills up, so room is made inside `score`."""
  mc = make(tiny_lm, tiny_gistnet, policy="oracle", gist_attention="visible")
  mc.ingest(tiny_base.text(400))
  nll = mc.score(tiny_base.text(700, 2))
  assert nll.shape == (700,) and np.isfinite(nll).all()
  assert mc.telemetry.counters["edits"] > 0
  mc.close()
