"""ContextLM and its slot cache against a plain decoder in NumPy."""

import dataclasses
import types

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import marks
import numpy as np
import pytest

from mcjax.config import Config
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING, McjaxError
from mcjax.window import kv_slots
from mcjax.window.context_lm import ContextLM
from mcjax.window.working_context import cold_start, cover

HISTORY = 2100  # two L2 nodes and a bit


@pytest.fixture(scope="module")
def tree(tiny_lm, tiny_gistnet):
  """A history of random tokens."""
  return tiny_base.random_tree(tiny_gistnet, HISTORY, 5)


def nodes_to(cursor, raw=()):
  """A cold tiling with the L1 blocks `raw` opened."""
  nodes = cold_start(cursor, 1, sink=32, recent=96, per_level=0)
  out = []
  for level, index in nodes:
    if level == 1 and index in raw:
      out += [(0, index * BRANCHING + k) for k in range(BRANCHING)]
    else:
      out.append((level, index))
  return out


def context_of(lm, tree, nodes, visible=True, sync=True, **config):
  context = ContextLM(lm, Config(**{"window": 512, **config}), visible)
  context.window.retile(nodes)
  context.load_unready(tree)
  if sync:
    context.sync()
  return context


def assert_exact(context, tree):
  np.testing.assert_allclose(
    context.logits(), tiny_base.window_logits(context, tree), atol=1e-4
  )


def greedy(context, tree, count):
  """Token by token with the plain decoder, starting at the window."""
  lm, window = context.lm, context.window.copy()
  e = window.entries
  table = np.asarray(lm.params["embed"])
  x = [
    table[tree.tokens(int(i), int(i) + 1)[0]] if l == 0
    else tree.gists(int(l), int(i), int(i) + 1)[0]
    for l, i in zip(e.level, e.index)
  ]
  seen = np.flatnonzero(
    ((e.level == 0) | context.show_gists) & ~window.hidden())
  positions = window.positions(context.gist_stride, lm.config.max_positions)
  places = positions[seen].tolist()
  rows = [x[k] for k in seen]
  at = window.next_position(context.gist_stride, lm.config.max_positions)
  out = []
  for _ in range(count):
    token = int(np.argmax(tiny_base.plain_logits(lm, rows, places)[-1]))
    out.append(token)
    rows.append(table[token])
    places.append(at)
    at += 1
  return out


def test_the_plain_decoder_is_the_decoder(tiny_lm):
  from mcjax.base import model

  ids = np.random.RandomState(0).randint(0, 300, 70).astype(np.int32)
  x = np.asarray(tiny_lm.params["embed"])[ids]
  plain = tiny_base.plain_logits(tiny_lm, x, np.arange(70))
  np.testing.assert_allclose(
    model.logits(tiny_lm.params, tiny_lm.config, ids), plain, atol=1e-4
  )
  assert np.std(plain, axis=0).mean() > 0.1  # the context matters


@pytest.mark.parametrize("visible, stride", [
  (True, 1), (False, 7), (True, 32),
  *marks.further((False, 1), (True, 7), (False, 32)),
])
def test_a_rebuild_equals_a_plain_forward_of_what_is_visible(
  tiny_lm, tree, visible, stride
):
  nodes = nodes_to(2071, raw=(3, 4, 40))
  context = context_of(tiny_lm, tree, nodes, visible, gist_stride=stride)
  assert context.tokens_run == (
    len(nodes) if visible else sum(level == 0 for level, _ in nodes)
  )
  assert_exact(context, tree)


@pytest.fixture(scope="module")
def local_lm(tiny_lm):
  """The first of two layers reads 40 positions and turns otherwise (Gemma)."""
  config = dataclasses.replace(
    tiny_lm.config, local_layers=(0,), local_window=40, local_rope_theta=50.0)
  return dataclasses.replace(tiny_lm, config=config)


@pytest.mark.parametrize("visible, stride", [(True, 1), (True, 5), (False, 1)])
def test_a_local_layer_reads_the_positions_in_its_span(
  tiny_lm, local_lm, tree, visible, stride
):
  nodes = nodes_to(1000, raw=(3, 20))
  context, everywhere = (
    context_of(lm, tree, nodes, visible, gist_stride=stride)
    for lm in (local_lm, tiny_lm))
  assert_exact(context, tree)
  assert np.abs(context.logits() - everywhere.logits()).max() > 0.1
  context.window.append_tokens(context.window.take_slots(5))
  context.load_unready(tree)
  context.sync()
  assert_exact(context, tree)
  expected = greedy(context, tree, 57)
  assert len(set(expected)) > 3
  out = [context.decode(limit, 0.0, jax.random.key(0))[0]
         for limit in (24, 32, 1)]
  assert np.concatenate(out).tolist() == expected


def test_gists_that_are_not_seen_leave_no_gap(tiny_lm, tree):
  nodes = nodes_to(1000, raw=(3, 20))
  context = context_of(tiny_lm, tree, nodes, False, gist_stride=5)
  raw = [index for level, index in nodes if level == 0]
  ids = np.array([tree.tokens(k, k + 1)[0] for k in raw])
  x = np.asarray(tiny_lm.params["embed"])[ids]
  plain = tiny_base.plain_logits(tiny_lm, x, np.arange(len(ids)))[-1]
  np.testing.assert_allclose(context.logits(), plain, atol=1e-4)


@settings(max_examples=15)
@given(st.data())
def test_any_tiling_equals_a_plain_forward(tiny_lm, tree, data):
  cursor = data.draw(st.integers(1, HISTORY))
  parts = sorted(data.draw(st.lists(st.integers(0, cursor), max_size=3)))
  edges = [max(0, cursor - 60), *(p for p in parts if p > cursor - 60), cursor]
  old = [p for p in parts if p <= cursor - 60]
  edges = sorted({0, *old, *edges})
  nodes = []
  for a, b in zip(edges[:-1], edges[1:]):
    nodes += cover(a, b, data.draw(st.integers(1, 2)) if b < cursor else 0)
  visible = data.draw(st.booleans())
  if not visible and not any(level == 0 for level, _ in nodes):
    return
  stride = data.draw(st.integers(1, 32))
  context = context_of(tiny_lm, tree, nodes, visible, gist_stride=stride)
  assert_exact(context, tree)


def test_gists_and_only_gists_are_read_through_the_adapter(tiny_lm, tree):
  lm = tiny_base.adapted(tiny_lm)
  nodes = nodes_to(900, raw=(2, 7))
  plain, context = (context_of(b, tree, nodes) for b in (tiny_lm, lm))
  assert_exact(context, tree)
  assert np.abs(context.logits() - plain.logits()).max() > 0.05
  tokens, _ = context.decode(32, 0.0, jax.random.key(0))
  assert len(tokens) == 32
  context.forget()
  before = context.logits()
  context.sync()
  np.testing.assert_allclose(context.logits(), before, atol=1e-4)
  masked = [context_of(b, tree, nodes, visible=False) for b in (tiny_lm, lm)]
  np.testing.assert_array_equal(*(c.logits() for c in masked))


def test_the_size_of_chunks_and_their_padding_never_matter(tiny_lm, tree):
  nodes = nodes_to(1500, raw=range(5, 12))
  logits = []
  for max_edits in (1, 2, 3, 4, 7):
    context = context_of(tiny_lm, tree, nodes, max_edits=max_edits)
    logits.append(context.logits())
  for other in logits[1:]:
    np.testing.assert_allclose(other, logits[0], atol=2e-5)


def test_what_unused_slots_hold_never_matters(tiny_lm, tree):
  nodes = nodes_to(700, raw=(2, 3))
  clean = context_of(tiny_lm, tree, nodes)
  dirty = ContextLM(tiny_lm, Config(window=512), True)
  dirty.state = jax.tree.map(lambda a: a + np.float32(1e3), dirty.state)
  dirty.window.retile(nodes)
  dirty.load_unready(tree)
  dirty.sync()
  np.testing.assert_array_equal(dirty.logits(), clean.logits())
  key = jax.random.key(0)
  np.testing.assert_array_equal(
    dirty.decode(32, 0.0, key)[0], clean.decode(32, 0.0, key)[0]
  )
  np.testing.assert_array_equal(dirty.logits(), clean.logits())


def test_where_slots_lie_never_matters(tiny_lm, tree):
  nodes = nodes_to(700, raw=(2, 3))
  plain = context_of(tiny_lm, tree, nodes)
  mixed = ContextLM(tiny_lm, Config(window=512), True)
  np.random.RandomState(0).shuffle(mixed.window._free)
  mixed.window.retile(nodes)
  mixed.load_unready(tree)
  mixed.sync()
  assert not np.array_equal(
    mixed.window.entries.slot, plain.window.entries.slot
  )
  np.testing.assert_allclose(mixed.logits(), plain.logits(), atol=2e-5)


@pytest.mark.parametrize("renew", [1, 33, 200, *marks.further(8)])
def test_splicing_is_exact_when_nothing_was_edited(tiny_lm, tree, renew):
  context = context_of(tiny_lm, tree, nodes_to(900, raw=(2, 7)))
  before, run = context.logits(), context.tokens_run
  context.sync(renew)
  assert context.tokens_run - run == min(renew, context.window.cost)
  np.testing.assert_allclose(context.logits(), before, atol=2e-5)
  assert_exact(context, tree)


def test_appending_in_pieces_is_exact(tiny_lm, tree):
  context = context_of(tiny_lm, tree, nodes_to(700))
  for count in (1, 5, 31, 32, 64, 1):
    context.window.append_tokens(context.window.take_slots(count))
    context.load_unready(tree)
    run = context.tokens_run
    context.sync()
    assert context.tokens_run - run == count
    assert_exact(context, tree)


def test_a_splice_runs_what_changed_and_leaves_the_rest_alone(tiny_lm, tree):
  nodes = nodes_to(1500)
  context = context_of(tiny_lm, tree, nodes)
  window = context.window
  kept = window.entries.slot[:-1]  # the newest entry is always run again
  before = jax.tree.map(np.asarray, context.state)
  stood = context.slot_arrays()[0]
  at = nodes.index((1, 9))
  gone = int(window.entries.slot[at])
  window.expand(at, step=0)
  context.load_unready(tree)
  run = context.tokens_run
  context.sync()
  assert context.tokens_run - run == BRANCHING + 1
  kept = kept[kept != gone]
  after = jax.tree.map(np.asarray, context.state)
  np.testing.assert_allclose(  # behind the edit they are turned on
    after.keys[:, :, kept], before.keys[:, :, kept], atol=2e-5)
  unmoved = kept[context.slot_arrays()[0][kept] == stood[kept]]
  assert 0 < len(unmoved) < len(kept)
  np.testing.assert_array_equal(
    after.keys[:, :, unmoved], before.keys[:, :, unmoved])
  np.testing.assert_array_equal(
    after.values[:, :, kept], before.values[:, :, kept]
  )
  # The new entries are exact; only what stands behind them is not renewed.
  stop = at + BRANCHING
  exact = context_of(tiny_lm, tree, [
    (int(l), int(i)) for l, i in zip(window.entries.level, window.entries.index)
  ])
  mine, theirs = window.entries.slot[:stop], exact.window.entries.slot[:stop]
  np.testing.assert_allclose(
    after.keys[:, :, mine], exact.state.keys[:, :, theirs], atol=1e-4
  )
  np.testing.assert_allclose(
    after.values[:, :, mine], exact.state.values[:, :, theirs], atol=1e-4
  )


@pytest.mark.parametrize("base", ["tiny_lm", "local_lm"])
def test_forgetting_makes_the_next_sync_exact(base, tree, request):
  context = context_of(request.getfixturevalue(base), tree, nodes_to(1500))
  context.window.expand(nodes_to(1500).index((1, 9)), step=0)
  context.load_unready(tree)
  context.sync()
  spliced = np.abs(context.logits() - tiny_base.window_logits(context, tree))
  assert spliced.max() > 1e-3  # a splice is not a rebuild
  context.forget()
  context.load_unready(tree)
  context.sync()
  assert_exact(context, tree)


def test_a_collapse_to_a_masked_gist_runs_one_token(tiny_lm, tree):
  context = context_of(tiny_lm, tree, nodes_to(1500, raw=(9,)), visible=False)
  at = context.window.entries.index.tolist().index(9 * BRANCHING)
  context.window.collapse(at, step=0)
  context.load_unready(tree)
  run = context.tokens_run
  context.sync()
  assert context.tokens_run - run == 1


def test_probing_stores_nothing(tiny_lm, tree):
  context = context_of(tiny_lm, tree, nodes_to(900, raw=(2,)))
  newest = tree.tokens(900 - BRANCHING, 900)
  before = jax.tree.map(np.asarray, context.state)
  probed = context.probe_nll(newest)
  for a, b in zip(before, context.state):
    np.testing.assert_array_equal(a, b)
  context.sync(renew=BRANCHING + 1)
  np.testing.assert_allclose(probed, context.newest_nll(newest), atol=2e-5)


@pytest.mark.parametrize("count", [1, 32, 33, 70, *marks.further(20)])
def test_newest_nll_is_that_of_the_plain_decoder(tiny_lm, tree, count):
  cursor = 135
  context = context_of(tiny_lm, tree, cover(0, cursor, 0), sync=False)
  context.sync(renew=count + 1)
  ids = tree.tokens(0, cursor)
  expected = tiny_base.plain_nll(tiny_lm, ids)[cursor - count :]
  np.testing.assert_allclose(
    context.newest_nll(ids[cursor - count :]), expected, atol=1e-4
  )


def test_the_first_token_of_all_has_no_prediction(tiny_lm, tree):
  context = context_of(tiny_lm, tree, cover(0, 20, 0), sync=False)
  context.sync(renew=21)
  ids = tree.tokens(0, 20)
  nll = context.newest_nll(ids)
  assert np.isnan(nll[0])
  np.testing.assert_allclose(
    nll, tiny_base.plain_nll(tiny_lm, ids), atol=1e-4
  )


@pytest.mark.parametrize("visible, stride", [
  (True, 5), (False, 1), *marks.further((True, 1), (False, 5)),
])
def test_decoding_equals_greedy_decoding_token_by_token(
  tiny_lm, tree, visible, stride
):
  nodes = nodes_to(1000, raw=(3, 4))
  context = context_of(tiny_lm, tree, nodes, visible, gist_stride=stride)
  expected = greedy(context, tree, 57)
  assert len(set(expected)) > 3
  out = []
  for limit in (24, 32, 1):
    ids, stopped = context.decode(limit, 0.0, jax.random.key(0))
    assert len(ids) == limit and not stopped
    out += ids.tolist()
  assert out == expected
  assert context.window.cursor == 1057


def test_decoded_keys_are_those_of_a_forward(tiny_lm, tree):
  context = context_of(tiny_lm, tree, nodes_to(1000))
  context.decode(24, 0.0, jax.random.key(0))
  decoded = jax.tree.map(np.asarray, context.state)
  logits = context.logits()
  context.sync(renew=25)
  np.testing.assert_allclose(context.logits(), logits, atol=2e-5)
  for a, b in zip(decoded, context.state):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_decoding_ends_with_a_stop_token(tiny_lm, tree):
  nodes = nodes_to(1000)
  plain = context_of(tiny_lm, tree, nodes)
  ids, _ = plain.decode(32, 0.0, jax.random.key(0))
  stop = int(ids[11])
  count = ids.tolist().index(stop) + 1
  lm = types.SimpleNamespace(
    name="tiny", config=tiny_lm.config, params=tiny_lm.params,
    tokenizer=types.SimpleNamespace(stop_ids=(7, stop)),
  )
  context = context_of(lm, tree, nodes)
  free = context.window.free
  out, stopped = context.decode(32, 0.0, jax.random.key(0))
  assert stopped and out.tolist() == ids[:count].tolist()
  assert context.window.free == free - count
  assert context.window.cursor == 1000 + count
  assert context.tokens_decoded == count


def test_sampling_follows_key_and_temperature(tiny_lm, tree):
  def sampled(temperature, seed):
    context = context_of(tiny_lm, tree, nodes_to(400))
    key = jax.random.key(seed)
    return context.decode(32, temperature, key)[0].tolist()

  assert sampled(1.0, 1) == sampled(1.0, 1) != sampled(1.0, 2)
  assert sampled(0.0, 1) == sampled(0.0, 2) != sampled(1.0, 1)


def test_restore_puts_everything_back(tiny_lm, tree):
  context = context_of(tiny_lm, tree, nodes_to(1000, raw=(3,)))
  window = context.window
  arrays = [a.copy() for a in window.entries.arrays()]
  logits, free = context.logits(), list(window._free)
  state = jax.tree.map(np.asarray, context.state)
  snapshot = context.snapshot()
  window.expand(nodes_to(1000, raw=(3,)).index((1, 7)), step=4)
  context.load_unready(tree)
  context.sync()
  context.decode(20, 0.0, jax.random.key(0))
  assert not np.array_equal(context.logits(), logits)
  context.restore(snapshot)
  assert context.window is window, "others hold on to the window"
  for a, b in zip(arrays, window.entries.arrays()):
    np.testing.assert_array_equal(a, b)
  assert window._free == free
  np.testing.assert_array_equal(context.logits(), logits)
  for a, b in zip(state, context.state):
    np.testing.assert_array_equal(a, b)


def test_warming_up_changes_nothing(tiny_lm, tree):
  context = context_of(tiny_lm, tree, nodes_to(300), delta_nll_every=1)
  logits = context.logits()
  state = jax.tree.map(np.asarray, context.state)
  context.warm_up()
  np.testing.assert_array_equal(context.logits(), logits)
  for a, b in zip(state, context.state):
    np.testing.assert_array_equal(a, b)


def test_the_window_must_fit_the_base(tiny_lm):
  with pytest.raises(McjaxError, match=r"config\.window 2048 .* tiny base"):
    ContextLM(tiny_lm, Config(window=2048), True)


def hidden_of(context, slots, positions, visible):
  lm, state = context.lm, context.state
  held = kv_slots.at_work(lm.config, state, positions)
  inputs = context.inputs_of(np.minimum(slots, len(positions) - 1))
  return kv_slots.splice(lm.params, lm.config, held, slots, *inputs,
                         positions, visible).hidden


def test_a_shift_of_all_positions_changes_nothing(tiny_lm, tree):
  """What is near and far is a matter of differences alone."""
  context = context_of(tiny_lm, tree, nodes_to(500))
  positions, visible = context.slot_arrays()
  newest = context.window.entries.slot[-1:]
  slots = np.concatenate([newest, np.full(7, 512, np.int32)])
  here = hidden_of(context, slots, positions, visible)[0]
  there = hidden_of(context, slots, positions + np.int32(900), visible)[0]
  np.testing.assert_allclose(here, there, atol=1e-4)
  visible[newest] = True
  stretched = np.where(positions > 40, positions + 900, positions)
  other = hidden_of(context, slots, stretched.astype(np.int32), visible)[0]
  assert np.abs(np.asarray(other - here)).max() > 1e-3


def test_gists_enter_as_they_are_stored(tiny_lm, tree):
  context = context_of(tiny_lm, tree, nodes_to(1000))
  e = context.window.entries
  for at in np.flatnonzero(e.level == 1):
    stored = tree.gists(1, int(e.index[at]), int(e.index[at]) + 1)[0]
    np.testing.assert_array_equal(context.gists[e.slot[at]], stored)
