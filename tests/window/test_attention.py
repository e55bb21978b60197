"""What the LM attends to while a question is answered."""

import numpy as np
import pytest
from runtime_cases import FACT, QUESTION, SMALL, spans, with_fact

from mcjax import Config, McjaxError, MegaContext
from mcjax.runtime.query import Query
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING
from mcjax.window import invariants
from mcjax.window.context_lm import ContextLM
from mcjax.window.working_context import Attention, WorkingContext

FACT_AT = 12_000
NODES = [*((0, i) for i in range(64)), (1, 2),
         *((0, i) for i in range(96, 150))]


def attended(window):
  return window.entries.index[
    ~window.hidden() & (window.entries.level == 0)].tolist()


@pytest.fixture(scope="module")
def tree(tiny_lm, tiny_gistnet):
  return tiny_base.random_tree(tiny_gistnet, 200, 5)


@pytest.fixture
def make(make):
  return lambda **config: with_fact(
    make(check_invariants=True, **config), 30_000, FACT_AT)


def assert_plain(mc):
  """The next token as a plain forward of what is attended to has it."""
  np.testing.assert_allclose(
    mc.next_logits(), tiny_base.window_logits(mc._loop.context, mc.tree),
    atol=1e-4)


def assert_read_from_the_fact(mc, out):
  place = (FACT_AT + 1, FACT_AT + 1 + len(FACT))
  assert any(a <= place[0] and place[1] <= b for a, b in spans(out))
  assert sum(b - a for a, b in spans(out)) < 200
  assert any(FACT in mc.text(a, b) for a, b in spans(out))
  prompt = mc.cursor - len(out.token_ids) - len(QUESTION)
  read = {t for t in attended(mc._loop.context.window) if t < prompt}
  assert read == {0}.union(*(range(a, b) for a, b in spans(out)))


# --- The window --------------------------------------------------------------


def test_hidden_tokens_are_not_visible_and_take_no_position():
  window = WorkingContext(512)
  window.retile(NODES)
  window.attention = Attention(((0, 1), (40, 43), (70, 80)), 140)
  assert attended(window) == [0, 40, 41, 42, *range(140, 150)]
  positions, visible = window.slot_arrays(0, 2048, show_gists=False)
  e = window.entries
  assert e.index[visible[e.slot]].tolist() == attended(window)
  np.testing.assert_array_equal(positions[e.slot][visible[e.slot]],
                                np.arange(14))
  assert window.next_position(0, 2048) == 14
  invariants.check_positions(window, 0, 2048)
  positions, visible = window.slot_arrays(3, 2048, show_gists=True)
  assert visible.sum() == 15 and window.next_position(3, 2048) == 17
  invariants.check_positions(window, 3, 2048)


def test_a_copy_takes_what_is_attended_to_along():
  window = WorkingContext(512)
  window.retile(NODES)
  window.attention = Attention(((0, 1),), 140)
  twin = window.copy()
  assert attended(twin) == attended(window)
  window.attention = None
  assert len(attended(window)) == 118
  window.become(twin)
  assert len(attended(window)) == 11


# --- The LM ------------------------------------------------------------------


def test_the_lm_reads_what_it_attends_to_alone(tiny_lm, tree):
  context = ContextLM(tiny_lm, Config(window=512, contrast=0), show_gists=False)
  context.window.retile(NODES)
  context.load_unready(tree)
  context.sync()
  run = context.tokens_run
  context.window.append_tokens(context.window.take_slots(20))
  context.load_unready(tree)
  assert context.attend(Attention(((0, 1), (40, 50)), 150))
  assert not context.is_synced
  context.sync()
  assert context.tokens_run - run == 1 + 10 + 20  # nothing else is run
  assert context.is_synced
  plain = tiny_base.window_logits(context, tree)
  np.testing.assert_allclose(context.logits(), plain, atol=1e-4)
  assert not context.attend(Attention(((0, 1), (40, 50)), 150))
  assert context.is_synced

  run = context.tokens_run
  assert context.attend(None)
  context.sync()  # what was read alone is read again beside the rest
  assert context.tokens_run - run == 1 + 10 + 1
  assert context.is_synced and not context.window.hidden().any()


def test_hidden_tokens_are_run_once_they_are_attended_to(tiny_lm, tree):
  context = ContextLM(tiny_lm, Config(window=512, contrast=0), show_gists=False)
  context.window.retile(NODES)
  context.load_unready(tree)
  context.attend(Attention(((0, 1), (40, 50)), 140))
  context.sync()
  assert context.tokens_run == 1 + 10 + 10
  context.attend(None)
  context.sync()
  assert context.tokens_run == 21 + (140 - 32) + 1
  context.forget()
  context.sync()
  np.testing.assert_allclose(
    context.logits(), tiny_base.window_logits(context, tree), atol=1e-4)


# --- The loop ----------------------------------------------------------------


@pytest.mark.parametrize("kv", ["splice", "exact"])
def test_an_answer_is_read_from_its_sources(make, kv):
  mc = make(kv=kv, gist_attention="masked")
  out = mc.generate(QUESTION, max_new_tokens=40)  # a refocus step in it
  assert_read_from_the_fact(mc, out)
  assert_plain(mc)


def test_lensnet_names_its_sources_too(make, monkeypatch):
  mc = make(policy="lensnet")
  policy = mc._loop._policy
  block = (FACT_AT + 1) // BRANCHING

  def score_rows(view, rows):
    policy.answerable = 0.9
    here = rows.block == block
    return np.where(here, 0.8, -0.1).astype(np.float32)

  monkeypatch.setattr(policy, "score_rows", score_rows)
  out = mc.generate(QUESTION, max_new_tokens=70)
  assert_read_from_the_fact(mc, out)
  monkeypatch.setattr(policy, "score_rows", lambda view, rows: np.full(
    len(rows), 0.1, np.float32))
  mc.generate(QUESTION, max_new_tokens=3)
  assert not mc._loop.sources
  assert not mc._loop.context.window.hidden().any()


def test_what_nothing_answers_sees_the_conversation_alone():
  """Its turns as they stand, not run anew, and what no block holds yet."""
  lm = tiny_base.make_lm(chat=True)
  mc = MegaContext.create(tiny_base.memory_url(), lm, Config(
    **{**SMALL, "policy": "recency", "contrast": 0.5}))
  mc.ingest(tiny_base.text(5000, 3))
  mc.generate("Hello there", max_new_tokens=3)
  first = mc.generate("How are you", max_new_tokens=3)
  assert not mc._loop.context.window.hidden().any()  # nobody denies it
  talk = mc.cursor
  mc._loop._policy.denies = True
  run = mc._loop.context.tokens_run
  out = mc.generate("Tell me a joke", max_new_tokens=3)
  assert mc._loop.context.tokens_run - run < 100 and not out.sources
  seen = attended(mc._loop.context.window)
  assert seen[0] == 0 and seen[1:] == list(range(seen[1], mc.cursor))
  told = mc.text(seen[1], talk)
  assert "Hello there" in told and "How are you" in told and first.text in told
  assert len(told) < 300
  mc.ingest(tiny_base.text(40, 9))
  assert not mc._loop.context.window.hidden().any()
  mc.generate("Tell me", max_new_tokens=3, template=False)  # text goes on
  assert not mc._loop.context.window.hidden().any()
  mc.close()


@pytest.mark.parametrize("place", ["before", "turn"])
def test_what_the_user_said_is_read_with_its_role(place):
  """Before the prompt's own turn, wherever other text is read."""
  lm = tiny_base.make_lm(chat=True)
  mc = MegaContext.create(tiny_base.memory_url(), lm, Config(
    **{**SMALL, "policy": "similarity", "read_place": place}))
  mc.ingest(tiny_base.text(200, 3))
  told = "The harbour master of Quenford is called Ilvik."
  mc.generate(f"{told} Good to know.", max_new_tokens=3)
  mc.ingest(tiny_base.text(60, 4))
  out = mc.generate("What is the harbour master of Quenford called?",
                    max_new_tokens=1)
  assert [s.text.strip() for s in out.sources] == [told]
  window = mc._loop.context.window
  rows = window.attention.order(window.entries)
  ids = window.entries.index[rows][
    (~window.hidden() & (window.entries.level == 0))[rows]]
  seen = lm.tokenizer.decode(np.array([
    int(mc.tree.tokens(t, t + 1)[0]) for t in ids.tolist()], np.int32))
  opening = np.asarray(lm.tokenizer.question_ids)
  first = int(np.flatnonzero(np.diff(ids) != 1)[0]) + 1  # behind the sink
  np.testing.assert_array_equal(
    mc.tree.tokens(int(ids[first]), int(ids[first]) + len(opening)), opening)
  assert seen.index(told) < seen.index("What is the harbour master")
  assert "Good to know" not in seen
  mc.close()


def test_whole_blocks_may_be_read_instead(make):
  mc = make(raw_attention="blocks", gist_attention="masked")
  out = mc.generate(QUESTION, max_new_tokens=3)
  prompt = mc.cursor - 3 - len(QUESTION)
  read = {t for t in attended(mc._loop.context.window) if t < prompt} - {0}
  blocks = {t // BRANCHING for a, b in spans(out) for t in range(a, b)}
  assert read == {b * BRANCHING + k for b in blocks for k in range(BRANCHING)}
  assert_plain(mc)


def test_all_raw_text_may_be_read_instead(make):
  mc = make(raw_attention="all")
  mc.generate(QUESTION, max_new_tokens=3)
  assert not mc._loop.sources
  assert not mc._loop.context.window.hidden().any()


def test_sources_that_are_not_in_the_window_hide_nothing(make, monkeypatch):
  mc = make(settle_steps=0)  # nothing is expanded before the answer
  place = ((FACT_AT + 1, FACT_AT + 1 + len(FACT)),)
  monkeypatch.setattr(type(mc._loop._policy), "sources", place)
  out = mc.generate(QUESTION, max_new_tokens=3)
  assert {e.level for e in out.focus if e.start <= FACT_AT < e.stop} != {0}
  assert not mc._loop.sources
  assert not mc._loop.context.window.hidden().any()


def test_reading_on_ends_it(make):
  mc, other = make(), make(raw_attention="all")
  for one in (mc, other):
    one.generate(QUESTION, max_new_tokens=3)
  assert mc._loop.context.window.hidden().any()
  mc.generate("xyz", max_new_tokens=3, remember=False)  # nothing answers it
  assert mc._loop.context.window.hidden().any()  # as it was
  scored = mc.score(tiny_base.text(40, 9))
  assert mc._loop.context.window.hidden().any()
  assert np.isfinite(scored).all()
  mc.ingest(tiny_base.text(40, 9))
  assert not mc._loop.context.window.hidden().any()
  mc.next_logits()
  assert mc._loop.context.is_synced


@pytest.mark.parametrize("read", ["sentences", "all"])
def test_a_history_that_fits_the_window_is_read_from_what_answers_too(
    tiny_lm, tiny_gistnet, read):
  with MegaContext.create(tiny_base.memory_url(), tiny_lm,
                          Config(**SMALL, raw_attention=read),
                          gistnet=tiny_gistnet) as mc:
    mc.ingest(tiny_base.text(20, 3) + FACT)
    out = mc.generate(QUESTION, max_new_tokens=3)
    assert [FACT in s.text for s in out.sources] == [True]
    seen = attended(mc._loop.context.window)
    if read == "all":
      assert not mc._loop.sources and len(seen) == mc.cursor
    else:
      end = mc.cursor - 3 - out.prompt_tokens
      assert {t for t in seen if t < end} == {0}.union(
        *(range(s.start, s.stop) for s in out.sources))


def test_a_pasted_text_is_read_whole_before_its_question(make):
  mc = make()
  pasted = tiny_base.text(200, 8) + QUESTION
  out = mc.generate(pasted, max_new_tokens=3, remember=True)
  assert mc._loop.query.start > mc._loop.query.prompt == 30_001
  assert out.sources
  raw = attended(mc._loop.context.window)
  mine = [e.start for e in mc.focus() if e.level == 0 and e.start >= 30_001]
  assert set(mine) <= set(raw) and len(mine) >= BRANCHING


def test_the_line_break_before_a_prompt_is_read_with_it(make):
  mc = make()
  mc.ingest("\n")
  end = mc.cursor - 1
  mc.generate(QUESTION, max_new_tokens=1)
  assert end in attended(mc._loop.context.window)
  assert end - 1 not in attended(mc._loop.context.window)


def test_a_probe_reads_nothing_hidden(make):
  mc = make(delta_nll_every=1)
  mc.generate(QUESTION, max_new_tokens=100)
  probes = [r for r in mc.telemetry.records if r["kind"] == "delta_nll"]
  assert probes and all(np.isfinite(r["nats"]) for r in probes)
  assert all(r["horizon"] <= BRANCHING for r in probes)


def test_text_of_tokens_that_are_not_there(make):
  mc = make()
  assert mc.text(FACT_AT + 1, FACT_AT + 1 + len(FACT)) == FACT
  for start, stop in ((0, mc.cursor + 1), (-1, 2), (5, 4)):
    with pytest.raises(McjaxError, match="are not in the history of 30001"):
      mc.text(start, stop)


def test_a_query_without_a_prompt_hides_nothing(make):
  mc = make()
  ids = mc.lm.tokenizer.encode("PUMP CODE")
  mc._loop.query = Query(ids, np.ones(len(ids), np.float32), mc.cursor,
                         asked=True)
  mc._loop.settle()
  mc._loop.attend()
  assert not mc._loop.context.window.hidden().any()
