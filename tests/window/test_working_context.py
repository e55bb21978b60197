"""WorkingContext: tilings, swaps, slots and positions, without any LM."""

import json

from hypothesis import given, settings, stateful
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.types import BRANCHING, McjaxError, span_width
from mcjax.window import invariants
from mcjax.window.working_context import (
  COLLAPSE,
  EXPAND,
  Attention,
  WorkingContext,
  cold_start,
  cover,
  effective_stride,
)

MAX = 3  # levels in these tests


def tiled(nodes, window=512):
  context = WorkingContext(window)
  context.retile(nodes)
  return context


def nodes_of(context):
  e = context.entries
  return list(zip(e.level.tolist(), e.index.tolist()))


def spans(nodes):
  return [(i * 32**l, (i + 1) * 32**l) for l, i in nodes]


def assert_tiles(nodes, start, stop):
  edges = spans(nodes)
  assert [start] + [b for _, b in edges] == [a for a, _ in edges] + [stop]


# --- Tilings -----------------------------------------------------------------


@given(st.integers(0, 70_000), st.integers(0, 70_000), st.integers(0, MAX))
def test_a_cover_tiles_with_the_coarsest_aligned_nodes(a, b, level):
  start, stop = min(a, b), max(a, b)
  if level < 2:
    stop = min(stop, start + 5000)
  nodes = cover(start, stop, level)
  assert_tiles(nodes, start, stop)
  for (l, index), (low, _) in zip(nodes, spans(nodes)):
    assert 0 <= l <= level
    up = 32 ** (l + 1)
    whole = low % up == 0 and low + up <= stop
    assert l == level or not whole, "32 siblings where a parent would do"
    assert index * 32**l == low
  for l in range(level):
    assert sum(k == l for k, _ in nodes) <= 2 * (BRANCHING - 1)


@given(
  st.integers(0, 2_000_000),
  st.sampled_from([0, 32, 128]),
  st.sampled_from([32, 256, 512]),
  st.integers(0, 64),
)
def test_a_cold_start_keeps_sink_and_newest_and_stays_small(
  cursor, sink, recent, per_level
):
  top = 0
  while cursor >= span_width(top + 1):
    top += 1
  nodes = cold_start(
    cursor, top, sink=sink, recent=recent, per_level=per_level
  )
  assert_tiles(nodes, 0, cursor)
  for (level, _), (start, stop) in zip(nodes, spans(nodes)):
    if start < sink or stop > cursor - recent:
      assert level == 0
    assert level <= top
  levels = [level for level, _ in nodes]
  assert len(nodes) <= sink + recent + 31 + top * (per_level + 31 + 31) + 31
  newest_first = levels[min(sink, cursor) :][::-1]
  coarsest = newest_first.index(max(newest_first)) if newest_first else 0
  assert newest_first[:coarsest] == sorted(newest_first[:coarsest])


# --- Swaps -------------------------------------------------------------------


def test_expand_and_collapse_undo_each_other():
  context = tiled([(0, i) for i in range(32)] + [(1, 1), (1, 2)])
  before = nodes_of(context)
  slot = int(context.entries.slot[33])
  children = context.expand(33, step=5)
  assert context.cost == 34 + 31 and context.free == 512 - 65
  assert children.index.tolist() == list(range(64, 96))
  assert set(children.level) == {0} and set(children.born) == {5}
  assert set(children.action) == {EXPAND} and not children.ready.any()
  assert slot in children.slot
  parent = context.collapse(33, step=9)
  assert parent.slot.tolist() == children.slot[:1].tolist()
  assert parent.action.tolist() == [COLLAPSE] and parent.born.tolist() == [9]
  assert not parent.ready.any()
  assert nodes_of(context) == before
  assert context.cost == 34 and context.free == 512 - 34


def test_misaligned_and_incomplete_groups_are_refused():
  context = tiled([(0, i) for i in range(70)])
  before = nodes_of(context)
  for at in (1, 5, 31, 33, 38, 64, 69):  # 5: tokens [5, 37); 64: incomplete
    with pytest.raises(McjaxError, match="32 siblings"):
      context.collapse(at, step=0)
  assert nodes_of(context) == before and context.free == 512 - 70
  context.collapse(32, step=0)
  assert nodes_of(context) == (
    [(0, i) for i in range(32)] + [(1, 1)] + [(0, i) for i in range(64, 70)]
  )


def test_siblings_of_mixed_levels_are_no_group():
  nodes = [(0, i) for i in range(32)] + [(1, i) for i in range(1, 64)]
  context = tiled(nodes)
  groups = np.flatnonzero(context.sibling_groups()).tolist()
  assert groups == [0, 63]  # tokens [0, 32), and L1 nodes 32..63
  assert nodes[63] == (1, 32)
  with pytest.raises(McjaxError, match="32 siblings"):
    context.collapse(31, step=0)  # (0, 31), (1, 1), ...
  context.collapse(63, step=0)
  assert nodes_of(context)[-1] == (2, 1)


def test_an_expand_needs_slots_and_children():
  context = tiled([(1, 0)] + [(0, i) for i in range(32, 520)], window=512)
  before = nodes_of(context)
  with pytest.raises(McjaxError, match="512 is full: 31 slots wanted, 23 free"):
    context.expand(0, step=0)
  with pytest.raises(McjaxError, match="L0 entry cannot be expanded"):
    context.expand(1, step=0)
  assert nodes_of(context) == before and context.free == 23


def test_retiling_keeps_the_slots_of_what_stays():
  context = tiled([(0, i) for i in range(64)])
  context.entries.ready[:] = True
  slots = context.entries.slot.copy()
  context.retile([(1, 0)] + [(0, i) for i in range(32, 70)])
  e = context.entries
  np.testing.assert_array_equal(e.slot[1:33], slots[32:])
  assert e.ready.tolist() == [False] + [True] * 32 + [False] * 6
  invariants.check_window(context, 70, max_level=1)


def test_a_copy_is_independent():
  context = tiled([(0, i) for i in range(64)])
  twin = context.copy()
  twin.collapse(0, step=1)
  twin.take_slots(3)
  twin.entries.ready[:] = True
  assert context.cost == 64 and context.free == 512 - 64
  assert not context.entries.ready.any()
  invariants.check_window(context, 64, max_level=1)


def test_runs_are_small_json_and_come_back():
  context = tiled([(0, i) for i in range(32)] + [(1, i) for i in range(1, 33)]
                  + [(0, i) for i in range(1056, 1070)])
  context.expand(40, step=1)
  runs = json.loads(json.dumps(context.runs()))
  assert len(runs) == 5
  other = WorkingContext(512)
  assert other.restore_runs(runs, 1070)
  assert nodes_of(other) == nodes_of(context)
  np.testing.assert_array_equal(other.entries.action, context.entries.action)
  assert WorkingContext(512).runs() == []


@pytest.mark.parametrize("runs, cursor", [
  ([[0, 0, 32, 0]], 33),  # too short
  ([[0, 0, 32, 0]], 31),  # too long
  ([[0, 0, 16, 0], [0, 17, 16, 0]], 33),  # a hole
  ([[0, 1, 32, 0]], 33),  # starts late
  ([[0, 0, 500, 0]], 500),  # no room for a block
  ([], 5),
])
def test_runs_that_do_not_fit_change_nothing(runs, cursor):
  context = tiled([(0, i) for i in range(10)])
  assert not context.restore_runs(runs, cursor)
  assert nodes_of(context) == [(0, i) for i in range(10)]
  assert context.free == 502


# --- Positions ---------------------------------------------------------------


def test_positions_by_hand():
  context = tiled([(0, i) for i in range(32)] + [(1, 1), (1, 2)]
                  + [(0, i) for i in range(96, 99)])
  compact = context.positions(1, 8192)
  np.testing.assert_array_equal(compact, np.arange(37))
  wide = context.positions(32, 8192).tolist()
  assert wide[:32] == list(range(32))
  assert wide[32:] == [48, 80, 96, 97, 98]  # centres of true spans
  assert context.next_position(32, 8192) == 99
  assert context.next_position(1, 8192) == 37


@given(
  st.integers(0, 100), st.integers(0, 200), st.integers(0, 100),
  st.integers(1, 32), st.sampled_from([400, 512, 700, 8192]),
)
def test_positions_rise_and_fit_the_base(old, gists, new, stride, limit):
  """`limit` leaves room for the entries and one block at least."""
  old, gists = old // 32 * 32, gists
  nodes = [(0, i) for i in range(old)]
  nodes += [(1, old // 32 + i) for i in range(gists)]
  base = old + 32 * gists
  nodes += [(0, base + i) for i in range(new)]
  context = tiled(nodes)
  if not nodes or len(nodes) + BRANCHING > limit:
    return
  positions = context.positions(stride, limit)
  assert positions[0] >= 0 and np.all(np.diff(positions) > 0)
  following = context.next_position(stride, limit)
  assert positions[-1] < following <= limit - BRANCHING
  used = effective_stride(context.entries.level, stride, limit)
  assert 1 <= used <= stride
  if used < stride:  # as wide as fits
    assert old + new + gists * (used + 1) > limit - BRANCHING
  invariants.check_positions(context, stride, limit)


def test_slot_arrays_follow_the_slots():
  context = tiled([(0, i) for i in range(32)] + [(1, 1)])
  e = context.entries
  e.slot[:] = e.slot[::-1].copy()
  positions, visible = context.slot_arrays(1, 8192, show_gists=False)
  np.testing.assert_array_equal(positions[e.slot], np.arange(33))
  assert visible[e.slot].tolist() == [True] * 32 + [False]
  assert visible.sum() == 32
  assert context.slot_arrays(1, 8192, show_gists=True)[1].sum() == 33


def test_gists_out_of_sight_are_hidden_and_take_no_position():
  context = tiled([(0, i) for i in range(32)] + [(1, i) for i in range(1, 5)]
                  + [(0, 160 + i) for i in range(3)])
  context.gists_seen = 2
  assert np.flatnonzero(context.hidden()).tolist() == [32, 33]
  positions, visible = context.slot_arrays(1, 8192, show_gists=True)
  seen = context.entries.slot[~context.hidden()]
  np.testing.assert_array_equal(positions[seen], np.arange(37))
  assert visible.sum() == 37 == context.next_position(1, 8192)
  assert context.copy().gists_seen == 2
  invariants.check_positions(context, 1, 8192)
  context.attention = Attention(((0, 1),), 160)
  assert not context.hidden()[[0, *range(36, 39)]].any()
  assert context.hidden()[1:36].all(), "an answer is read from sentences alone"


# --- Any sequence ------------------------------------------------------------


class Edits(stateful.RuleBasedStateMachine):
  """Random appends, expands, collapses and retilings against a plain list."""

  WINDOW = 192

  def __init__(self):
    super().__init__()
    self.context = WorkingContext(self.WINDOW)
    self.nodes = []
    self.step = 0

  def top(self):
    cursor, level = self.context.cursor, 0
    while cursor >= span_width(level + 1):
      level += 1
    return level

  @stateful.rule(count=st.integers(0, 100), ready=st.booleans())
  def append(self, count, ready):
    if count > self.context.free:
      with pytest.raises(McjaxError, match="is full"):
        self.context.take_slots(count)
      return
    cursor = self.context.cursor
    self.context.append_tokens(self.context.take_slots(count), ready)
    self.nodes += [(0, cursor + k) for k in range(count)]

  @stateful.rule(pick=st.integers(0, 10_000))
  def expand(self, pick):
    coarse = [k for k, (level, _) in enumerate(self.nodes) if level]
    if not coarse:
      return
    at = coarse[pick % len(coarse)]
    level, index = self.nodes[at]
    self.step += 1
    if self.context.free < BRANCHING - 1:
      with pytest.raises(McjaxError, match="is full"):
        self.context.expand(at, self.step)
      return
    self.context.expand(at, self.step)
    self.nodes[at : at + 1] = [
      (level - 1, index * BRANCHING + k) for k in range(BRANCHING)
    ]

  @stateful.rule(pick=st.integers(0, 10_000), grouped=st.booleans())
  def collapse(self, pick, grouped):
    starts = [
      k for k, (level, index) in enumerate(self.nodes)
      if index % BRANCHING == 0
      and self.nodes[k : k + BRANCHING]
      == [(level, index + j) for j in range(BRANCHING)]
    ]
    choice = starts if grouped and starts else range(len(self.nodes))
    if not len(choice):
      return
    at = choice[pick % len(choice)]
    self.step += 1
    if at not in starts:
      with pytest.raises(McjaxError, match="32 siblings"):
        self.context.collapse(at, self.step)
      return
    level, index = self.nodes[at]
    self.context.collapse(at, self.step)
    self.nodes[at : at + BRANCHING] = [(level + 1, index // BRANCHING)]

  @stateful.rule(recent=st.sampled_from([32, 64]), per=st.integers(0, 1))
  def retile(self, recent, per):
    nodes = cold_start(
      self.context.cursor, self.top(), sink=0, recent=recent, per_level=per
    )
    if len(nodes) <= self.WINDOW:
      self.context.retile(nodes)
      self.nodes = nodes

  @stateful.rule()
  def resume(self):
    runs = json.loads(json.dumps(self.context.runs()))
    twin = WorkingContext(self.WINDOW)
    fits = self.context.free >= BRANCHING
    if not self.nodes:
      return
    assert twin.restore_runs(runs, self.context.cursor) == fits
    if fits:
      self.context = twin

  @stateful.rule()
  def undo(self):
    twin = self.context.copy()
    if self.context.cost:
      self.context.give_slots(self.context.take_slots(self.context.free))
      self.context.retile([])
    self.context.become(twin)

  @stateful.invariant()
  def holds(self):
    assert nodes_of(self.context) == self.nodes
    assert self.context.cost == len(self.nodes)
    cursor = spans(self.nodes)[-1][1] if self.nodes else 0
    assert self.context.cursor == cursor
    assert [tuple(f) for f in self.context.focus()] == [
      (l, a, b) for (l, _), (a, b) in zip(self.nodes, spans(self.nodes))
    ]
    invariants.check_window(self.context, cursor, max_level=self.top())
    invariants.check_positions(self.context, 32, 1024)
    groups = self.context.sibling_groups()
    for at in np.flatnonzero(groups):
      level, index = self.nodes[at]
      assert self.nodes[at : at + BRANCHING] == [
        (level, index + k) for k in range(BRANCHING)
      ] and index * 32**level % span_width(level + 1) == 0


TestEdits = Edits.TestCase
TestEdits.settings = settings(max_examples=40, stateful_step_count=25)
