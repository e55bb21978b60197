"""FocusAllocator against the greedy rule written out in plain Python."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.focus.allocator import (
  Legal,
  allocate,
  apply_plan,
  legal_edits,
  plan_edits,
)
from mcjax.types import BRANCHING
from mcjax.window import invariants
from mcjax.window.working_context import COLLAPSE, EXPAND, WorkingContext

WINDOW = 512
THRESHOLD = 0.25  # exact in binary, like every score here


def tokens(start, stop):
  return [(0, i) for i in range(start, stop)]


def tiled(nodes, window=WINDOW):
  context = WorkingContext(window)
  context.retile(nodes)
  return context


def mixed():
  """Tokens [0, 64), L1 blocks 2..31, L2 1..3, tokens of block 128, 129, 7."""
  nodes = tokens(0, 64) + [(1, i) for i in range(2, 32)]
  nodes += [(2, 1), (2, 2), (2, 3)] + tokens(4096, 4167)
  return tiled(nodes)


def legal_of(context, step=100, cooldown=2, sink=0, protect=0):
  return legal_edits(
    context, step=step, cooldown=cooldown, sink=sink, protect=protect
  )


def plan_of(context, scores, legal=None, **changes):
  arguments = dict(
    free=context.free, need=0, threshold=THRESHOLD, max_edits=4
  )
  plan = plan_edits(
    np.asarray(scores, np.float32), legal or legal_of(context),
    **{**arguments, **changes},
  )
  return [
    (int(a), int(at)) for a, at in zip(plan.action, plan.entry) if a
  ]


def flat(context, value=0.0, **at):
  """Scores of one value, others by entry: at_3=1.0 is entry 3."""
  scores = np.full(context.cost, value, np.float32)
  for name, score in at.items():
    scores[int(name.removeprefix("at_"))] = score
  return scores


def greedy(scores, legal, free, need, threshold, max_edits):
  """The rule of `allocate`, slowly and without masks."""
  scores = [float(s) for s in scores]
  expands = {k for k in np.flatnonzero(legal.expand)}
  groups = {k for k in np.flatnonzero(legal.collapse)}

  def mean(k):
    return sum(scores[k : k + BRANCHING]) / BRANCHING

  plan = []
  for _ in range(max_edits):
    best = min(expands, key=lambda k: (-scores[k], k), default=None)
    worst = min(groups, key=lambda k: (mean(k), k), default=None)
    if free < need and worst is not None:
      action = COLLAPSE
    elif (best is not None and scores[best] > threshold
          and free - need >= BRANCHING - 1):
      action = EXPAND
    elif worst is not None and mean(worst) < -threshold:
      action = COLLAPSE
    else:
      break
    if action == EXPAND:
      plan.append((EXPAND, best))
      expands.remove(best)
      groups = {k for k in groups if not k <= best < k + BRANCHING}
      free -= BRANCHING - 1
    else:
      plan.append((COLLAPSE, worst))
      expands = {k for k in expands if not worst <= k < worst + BRANCHING}
      groups = {k for k in groups if abs(k - worst) >= BRANCHING}
      free += BRANCHING - 1
  return plan


eighths = st.integers(-8, 8).map(lambda n: n / 8)


@settings(max_examples=120)
@given(st.data())
def test_plans_equal_the_greedy_rule_and_are_legal(data):
  nodes = []
  for _ in range(data.draw(st.integers(0, 9))):
    start = nodes[-1] if nodes else (0, -1)
    cursor = (start[1] + 1) * 32 ** start[0]
    kind = data.draw(st.sampled_from(["raw", "one", "gists", "top"]))
    if kind == "raw" and cursor % 32 == 0:
      nodes += tokens(cursor, cursor + 32)
    elif kind == "one" and cursor % 32 == 0:
      nodes.append((1, cursor // 32))
    elif kind == "gists" and cursor % 1024 == 0:
      nodes += [(1, cursor // 32 + k) for k in range(32)]
    elif kind == "top" and cursor % 1024 == 0:
      nodes.append((2, cursor // 1024))
  if nodes and nodes[-1][0] < 2:
    cursor = (nodes[-1][1] + 1) * 32 ** nodes[-1][0]
    nodes += tokens(cursor, cursor + data.draw(st.integers(0, 31)))
  context = tiled(nodes)
  count = context.cost
  runs = data.draw(
    st.lists(eighths, min_size=count // 16 + 1, max_size=count // 16 + 1)
  )
  spikes = data.draw(
    st.lists(st.tuples(st.integers(0, max(0, count - 1)), eighths), max_size=6)
  )
  scores = np.repeat(np.float32(runs), 16)[:count]
  for at, value in spikes if count else ():
    scores[at] = value
  born = data.draw(st.lists(st.integers(95, 100), min_size=6, max_size=6))
  action = data.draw(st.lists(st.integers(-1, 1), min_size=6, max_size=6))
  context.entries.born[:] = np.resize(np.repeat(born, 40), count)
  context.entries.action[:] = np.resize(np.repeat(action, 40), count)
  sink = data.draw(st.sampled_from([0, 32, 64]))
  protect = data.draw(st.sampled_from([0, 32, 64]))
  cooldown = data.draw(st.integers(0, 3))
  legal = legal_of(context, 100, cooldown, sink, protect)
  free = data.draw(st.integers(0, context.free))
  need = data.draw(st.sampled_from([0, 1, 32, 100]))
  edits = data.draw(st.sampled_from([1, 4]))
  got = plan_of(
    context, scores, legal, free=free, need=need, max_edits=edits
  )
  assert got == greedy(scores, legal, free, need, THRESHOLD, edits)

  # What no plan may do, in words of the window.
  assert len(got) <= edits
  cursor, e = context.cursor, context.entries
  starts, widths = e.start(), e.width()
  touched = []
  room = free
  for kind, at in got:
    rows = range(at, at + (1 if kind == EXPAND else BRANCHING))
    touched += rows
    room -= (BRANCHING - 1) * kind
    assert room >= 0
    for k in rows:
      opposite = e.action[k] == -kind and 100 - e.born[k] <= cooldown
      assert not opposite
      if kind == COLLAPSE:
        assert starts[k] >= sink and starts[k] + widths[k] <= cursor - protect
    if kind == COLLAPSE:
      level = int(e.level[at])
      assert starts[at] % 32 ** (level + 1) == 0
      assert set(e.level[at : at + BRANCHING].tolist()) == {level}
  assert len(touched) == len(set(touched)), "two edits of one entry"

  before = context.cost
  if free == context.free:
    plan = plan_edits(
      scores, legal, free=free, need=need, threshold=THRESHOLD, max_edits=edits
    )
    apply_plan(context, plan, 100)
    change = sum(31 * kind for kind, _ in got)
    assert context.cost == before + change
    if nodes:
      invariants.check_window(context, cursor, max_level=2)


def test_nothing_happens_within_the_thresholds():
  context = mixed()
  assert plan_of(context, flat(context, 0.25)) == []
  assert plan_of(context, flat(context, -0.25)) == []
  assert plan_of(context, flat(context, at_64=0.26)) == [(EXPAND, 64)]
  scores = flat(context)
  scores[0:32] = -0.26
  assert plan_of(context, scores) == [(COLLAPSE, 0)]


def test_best_expands_first_and_at_most_n_diff():
  context = mixed()
  scores = flat(context, at_64=0.5, at_70=0.9, at_80=0.7, at_94=0.6, at_95=0.8)
  expected = [(EXPAND, k) for k in (70, 95, 80, 94, 64)]
  for most in (1, 2, 4):
    assert plan_of(context, scores, max_edits=most) == expected[:most]


def test_the_budget_is_checked_before_every_edit():
  context = mixed()
  scores = flat(context, at_70=0.9, at_80=0.8, at_90=0.7)
  for free in (0, 30):
    assert plan_of(context, scores, free=free) == []
  assert plan_of(context, scores, free=31) == [(EXPAND, 70)]
  assert plan_of(context, scores, free=92) == [(EXPAND, 70), (EXPAND, 80)]
  assert plan_of(context, scores, free=94, need=32) == [
    (EXPAND, 70), (EXPAND, 80)
  ]
  assert plan_of(context, scores, free=93, need=32) == [(EXPAND, 70)]


def test_an_expand_is_paid_by_a_collapse_in_the_same_plan():
  context = mixed()
  scores = flat(context, at_70=0.9)
  scores[0:32] = -0.5
  assert plan_of(context, scores, free=0) == [(COLLAPSE, 0), (EXPAND, 70)]
  # Nobody is made to pay for another's wish.
  scores[0:32] = -0.25
  assert plan_of(context, scores, free=0) == []
  # With slots to spare both happen too, so that focus can trade.
  scores[0:32] = -0.5
  assert plan_of(context, scores) == [(EXPAND, 70), (COLLAPSE, 0)]


def test_a_full_window_applies_the_trade():
  nodes = tokens(0, 448) + [(1, k) for k in range(14, 32)]
  context = tiled(nodes + tokens(1024, 1054), window=496)
  assert context.free == 0
  scores = np.zeros(context.cost, np.float32)
  scores[460], scores[32:64] = 0.9, -0.5
  plan = plan_edits(
    scores, legal_of(context), free=0, need=0, threshold=0.2, max_edits=4
  )
  edits = apply_plan(context, plan, step=3)
  assert edits == [(COLLAPSE, 1, 1), (EXPAND, 1, 26)]
  assert context.free == 0
  invariants.check_window(context, 1054, max_level=1)
  levels = dict((f.start, f.level) for f in context.focus())
  assert levels[32] == 1 and levels[26 * 32] == 0


def test_missing_slots_force_the_lowest_groups_whatever_their_score():
  context = mixed()
  scores = flat(context, 0.1)
  scores[32:64] = 0.05  # the lowest group, though it wants to stay
  scores[70] = 0.9
  assert plan_of(context, scores, free=1, need=32) == [(COLLAPSE, 32)]
  # As many as are needed, then the wish.
  got = plan_of(context, scores, free=0, need=32)
  assert got == [(COLLAPSE, 32), (COLLAPSE, 0)]
  got = plan_of(context, scores, free=32, need=32 + 31)
  assert got == [(COLLAPSE, 32)]
  got = plan_of(context, scores, free=31, need=31)
  assert got == []


def test_no_group_no_collapse():
  context = tiled(tokens(0, 31))
  assert plan_of(context, flat(context, -1.0), free=0, need=32) == []


def test_sink_and_newest_tokens_are_pinned():
  context = tiled(tokens(0, 200))
  scores = flat(context, -1.0)
  legal = legal_of(context, sink=64, protect=64)
  assert np.flatnonzero(legal.collapse).tolist() == [64, 96]
  assert plan_of(context, scores, legal) == [(COLLAPSE, 64), (COLLAPSE, 96)]
  legal = legal_of(context, sink=64, protect=73)  # [96, 128) touches the tail
  assert np.flatnonzero(legal.collapse).tolist() == [64]
  forced = plan_of(context, scores, legal, free=0, need=200)
  assert forced == [(COLLAPSE, 64)]


@pytest.mark.parametrize("cooldown", [0, 1, 2, 5])
def test_cooldown_bars_the_opposite_action_only(cooldown):
  context = mixed()
  context.expand(64, step=10)  # L1 block 2
  context.collapse(0, step=10)  # block 0 becomes entry 0
  for step in range(11, 18):
    legal = legal_of(context, step, cooldown)
    barred = step - 10 <= cooldown
    assert bool(legal.expand[0]) == (not barred)
    opened = int(np.flatnonzero(context.entries.index == 64)[0])
    assert bool(legal.collapse[opened]) == (not barred)
    assert legal.expand[40:95].any(), "others are free"
  # The same direction is never barred.
  context = tiled([(2, 0), (2, 1)])
  context.expand(0, step=10)
  assert legal_of(context, 11, cooldown).expand[:33].all()


def test_only_coarse_entries_expand():
  context = mixed()
  legal = legal_of(context)
  coarse = np.flatnonzero(context.entries.level > 0)
  np.testing.assert_array_equal(np.flatnonzero(legal.expand), coarse)
  assert legal.expand.shape == legal.collapse.shape == (WINDOW,)


def test_edits_of_one_plan_never_meet():
  """A child of a group that collapses is not expanded, nor the reverse."""
  nodes = [(1, k) for k in range(32)] + tokens(1024, 1030)
  context = tiled(nodes)
  scores = flat(context, -1.0)
  scores[3] = 1.0  # mean of the group is below -threshold all the same
  assert plan_of(context, scores) == [(EXPAND, 3)]
  assert plan_of(context, scores, free=0) == [(COLLAPSE, 0)]
  assert plan_of(context, scores, free=0, max_edits=4) == [(COLLAPSE, 0)]


def test_swaps_report_the_node_that_was_swapped():
  context = mixed()
  plan = plan_edits(
    flat(context, at_95=0.9), legal_of(context), free=context.free, need=0,
    threshold=0.2, max_edits=4,
  )
  assert apply_plan(context, plan, 7) == [(EXPAND, 2, 2)]
  assert set(context.entries.born[95:127].tolist()) == {7}


def test_padding_is_never_chosen():
  """Entries behind the last one have score 0, which beats a low threshold."""
  scores = np.full(WINDOW, -1.0, np.float32)
  scores[5:] = 0.0
  nothing = np.zeros(WINDOW, bool)
  action, _ = allocate(
    scores, nothing, nothing, np.int32(400), np.int32(0), np.float32(-0.5), 4
  )
  assert not np.any(action)
  context = tiled(tokens(0, 40))
  legal = legal_of(context)
  assert np.flatnonzero(legal.collapse).tolist() == [0]
  assert isinstance(legal, Legal)
