"""Focus while text is read on: what is wished for, and what pays for it."""

import dataclasses

import numpy as np
import pytest
import tiny_base

from mcjax import Config, MegaContext, focus_allocator, novelty
from mcjax import keys as lexical
from mcjax.policies import FocusView
from mcjax.types import BRANCHING


@pytest.fixture
def mc(tiny_lm, tiny_gistnet):
  """A history of 4,000 tokens in a window of 512."""
  config = Config(window=512, recent_tokens=64, gists_per_level=8)
  with MegaContext.create(
    tiny_base.memory_url(), tiny_lm, config, gistnet=tiny_gistnet
  ) as mc:
    mc.ingest(tiny_base.text(4000))
    yield mc


def view_of(mc, query_ids=(), **changes):
  window = mc._loop.context.window
  legal = focus_allocator.legal_edits(
    window, step=mc._loop.step, cooldown=2, sink=32, protect=64)
  ids = np.array(query_ids, np.int32)
  return dataclasses.replace(FocusView(
    window.entries, mc.tree, ids, np.ones(len(ids), np.float32), mc.cursor,
    False, mc._loop.step, False, legal.collapse[: len(window.entries)],
    context_lm=mc._loop.context), **changes)


def fill(mc, free):
  window = mc._loop.context.window
  window.append_tokens(window.take_slots(window.free - free))


def gist_blocks(mc):
  e = mc._loop.context.window.entries
  return e.index[e.level == 1].tolist(), np.flatnonzero(e.level == 1)


def lacking(mc, block):
  """Tokens of a block that the newest raw text does not hold."""
  e = mc._loop.context.window.entries
  start = int(e.start()[novelty.newest_raw(e)])
  ids = mc.tree.tokens(block * BRANCHING, (block + 1) * BRANCHING)
  out = ids[~np.isin(ids, mc.tree.tokens(start, mc.cursor))]
  assert len(out), "the text repeats too much for this test"
  return out


def test_without_wishes_nothing_moves_but_to_make_room(mc):
  view = view_of(mc)
  e = view.entries
  out = novelty.reading_scores(view, {})
  assert (np.abs(out) < 0.2).all()
  newest = novelty.newest_raw(e)
  near = out[newest:][::BRANCHING]
  assert (np.diff(near) > 0).all()  # the oldest goes first
  far = out[:newest][e.level[:newest] == 0]
  assert out[e.level > 0].max() < far.min() <= far.max() < near.min()


def test_a_wish_is_granted_and_the_least_worth_pays(mc):
  blocks, entries = gist_blocks(mc)
  fill(mc, free=40)
  view = view_of(mc)
  out = novelty.reading_scores(view, {blocks[0]: 0.3})
  assert out[entries[0]] == np.float32(0.5)
  offered = np.flatnonzero(out < -0.2)
  assert len(offered) == BRANCHING  # one group pays for one expand
  start = view.entries.start()
  assert view.collapsible[offered[0]]
  raw = np.flatnonzero(view.collapsible & (view.entries.level == 0))
  assert start[offered[0]] == start[raw].min()  # the oldest raw one
  legal = focus_allocator.legal_edits(
    mc._loop.context.window, step=0, cooldown=2, sink=32, protect=64)
  plan = focus_allocator.plan_edits(
    out, legal, free=40, need=32, threshold=0.2, max_edits=4)
  assert plan.action.tolist() == [-1, 1, 0, 0]
  assert plan.entry[1] == entries[0]


def test_with_room_to_spare_nobody_pays(mc):
  blocks, _ = gist_blocks(mc)
  out = novelty.reading_scores(view_of(mc), {blocks[0]: 0.3})
  assert (out > 0.2).sum() == 1 and out.min() >= 0


def test_the_siblings_of_a_wished_gist_stay(mc):
  window = mc._loop.context.window
  e = window.entries
  coarse = int(np.flatnonzero(e.level == 2)[0])
  first = int(e.index[coarse]) * BRANCHING
  window.expand(coarse, -10)
  fill(mc, free=33)
  view = view_of(mc)
  assert view.collapsible[coarse]
  idle = novelty.reading_scores(view, {})
  assert idle[coarse : coarse + BRANCHING].max() < 0.02
  out = novelty.reading_scores(view, {first + 7: 0.4, first + 9: 0.3})
  group = out[coarse : coarse + BRANCHING]
  np.testing.assert_allclose(group[[7, 9]], [0.6, 0.5])
  assert np.delete(group, [7, 9]).min() > 0.18
  assert (out < -0.2).sum() == 2 * BRANCHING  # one for each


def test_wishes_are_for_what_the_newest_raw_text_lacks(mc):
  blocks, _ = gist_blocks(mc)
  far = blocks[0]
  ids = mc.tree.tokens(far * BRANCHING, (far + 1) * BRANCHING)
  new = lacking(mc, far)
  policy = novelty.Novelty(max_nodes=256)
  wishes = policy.wishes(view_of(mc, ids))
  assert far in wishes
  weights = lexical.query_weights(mc.tree, ids, np.ones(len(ids), np.float32))
  left = weights[np.isin(ids, new)].sum() / weights.sum()
  assert 0 < wishes[far] <= left + 1e-6
  assert 0 < policy.touched <= 256 and policy.bytes_read > 0
  known = ids[~np.isin(ids, new)]
  assert policy.wishes(view_of(mc, known)) == {}
  assert policy.touched == 0


def test_few_wishes_at_one_time_and_none_for_a_price_above_its_share(
  mc, monkeypatch
):
  blocks, _ = gist_blocks(mc)
  ids = np.concatenate([lacking(mc, b)[:3] for b in blocks[:7]])
  policy = novelty.Novelty(max_nodes=1024)
  monkeypatch.setattr(novelty, "_SLOT_PRICE", 0.0)
  assert len(policy.wishes(view_of(mc, ids))) == novelty.WISHES
  monkeypatch.setattr(novelty, "_SLOT_PRICE", 1.0)
  assert policy.wishes(view_of(mc, ids)) == {}


def test_what_is_raw_already_is_cheaper_and_pinned_text_is_no_wish(mc):
  window = mc._loop.context.window
  blocks, entries = gist_blocks(mc)
  window.expand(int(entries[0]), -10)
  ids = lacking(mc, blocks[0])
  policy = novelty.Novelty(max_nodes=1024)
  wishes = policy.wishes(view_of(mc, ids))
  assert blocks[0] in wishes
  sink = mc.tree.tokens(0, BRANCHING)
  assert 0 not in policy.wishes(view_of(mc, sink))


def test_a_coarse_entry_is_opened_down_to_the_wish_in_one_go(
  mc, monkeypatch
):
  loop = mc._loop
  e = loop.context.window.entries
  coarse = int(np.flatnonzero(e.level == 2)[0])
  block = int(e.index[coarse]) * BRANCHING + 5
  monkeypatch.setattr(
    loop._policy, "score",
    lambda view: novelty.reading_scores(view, {block: 0.5}))
  before = loop.step
  assert loop.refocus_down() == 2
  assert loop.step == before + 2
  e = loop.context.window.entries
  raw = (e.level == 0) & (e.index // BRANCHING == block)
  assert raw.sum() == BRANCHING
  assert loop.refocus_down() == 0 and loop.step == before + 3


def test_what_misleads_has_to_go_and_is_tried_again_later(mc, monkeypatch):
  window = mc._loop.context.window
  blocks, entries = gist_blocks(mc)
  window.expand(int(entries[0]), -10)
  mc.next_logits()  # the LM has read on
  ids = lacking(mc, blocks[0])
  policy = novelty.Novelty(max_nodes=256)
  harm = 0.0

  def probe(newest, without=None):
    if without is not None:
      assert without.sum() == BRANCHING
    return np.full(len(newest), 1.0 - (harm if without is not None else 0.0))

  def wishes(step):
    return policy.wishes(view_of(mc, ids, step=step))

  monkeypatch.setattr(mc._loop.context, "probe_nll", probe)
  assert blocks[0] in wishes(0) and not policy.unwelcome
  for step, pause in ((1, 8), (50, 16)):  # twice as long the second time
    harm = 0.5
    assert wishes(step) == {} and policy.unwelcome
    out = novelty.reading_scores(view_of(mc), {}, policy.unwelcome)
    assert (out < -0.2).sum() == BRANCHING
    assert wishes(step + pause - 1) == {}
    harm = -0.1
    assert blocks[0] in wishes(step + pause) and not policy.unwelcome
  harm = 0.5
  assert wishes(90) == {}
  harm = 0.0
  assert blocks[0] in wishes(3)  # time went back: what was read is undone


def test_a_probe_can_leave_entries_out(mc):
  loop = mc._loop
  window = loop.context.window
  _, entries = gist_blocks(mc)
  window.expand(int(entries[0]), -10)
  mc.next_logits()
  newest = mc.tree.tokens(mc.cursor - BRANCHING, mc.cursor)
  none = np.zeros(len(window.entries), bool)
  plain = loop.context.probe_nll(newest)
  np.testing.assert_array_equal(loop.context.probe_nll(newest, none), plain)
  brought = novelty._brought(window.entries)
  assert brought.sum() == BRANCHING
  less = loop.context.probe_nll(newest, brought)
  assert np.abs(less - plain).max() > 1e-4
  window.entries.ready[brought] = False  # as if it were not there
  np.testing.assert_allclose(loop.context.probe_nll(newest), less, rtol=1e-5)
