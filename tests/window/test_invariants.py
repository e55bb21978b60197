"""Every invariant is noticed when broken, and random sequences keep them."""

from hypothesis import given, settings
from hypothesis import strategies as st
import marks
import numpy as np
import pytest

from mcjax import Config, MegaContext
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING
from mcjax.window import invariants
from mcjax.window.invariants import InvariantError
from mcjax.window.working_context import Entries, WorkingContext, cold_start

WINDOW = 512


@pytest.fixture
def window():
  context = WorkingContext(WINDOW)
  context.retile(cold_start(3000, 2, sink=32, recent=64, per_level=8))
  return context


def check(context, cursor=3000, **changes):
  invariants.check_window(
    context, cursor, **{"max_level": 2, "sink": 32, **changes}
  )


def edited(context, **fields):
  """The window with arrays of its entries replaced by what functions give."""
  e = context.entries
  values = [
    fields[name](a) if name in fields else a
    for name, a in zip(Entries.__dataclass_fields__, e.arrays())
  ]
  context.entries = Entries(*values)
  return context


def at(row, value):
  def change(array):
    array = array.copy()
    array[row] = value
    return array

  return change


def test_a_sound_window_passes(window):
  check(window)
  assert set(window.entries.level.tolist()) == {0, 1, 2}


def test_each_broken_window_is_named(window):
  coarse = int(np.flatnonzero(window.entries.level == 1)[0])
  e = window.entries
  for name, broken, kwargs in (
    ("contiguity", edited(window.copy(), index=at(coarse, 90)), {}),
    ("contiguity", edited(window.copy(), level=at(coarse, 0)), {}),
    ("contiguity", window, {"cursor": 2999}),
    ("contiguity", window, {"cursor": 3001}),
    ("level consistency", window, {"max_level": 1}),
    ("slots are shared", edited(window.copy(), slot=at(3, e.slot[4])), {}),
    ("sink is not at L0", window, {"sink": 96}),
  ):
    with pytest.raises(InvariantError, match=name):
      check(broken, **kwargs)
  leaky = window.copy()
  leaky.take_slots(1)
  with pytest.raises(InvariantError, match="slots leak"):
    check(leaky)
  double = window.copy()
  double.give_slots(e.slot[:1])
  with pytest.raises(InvariantError, match="free list"):
    check(double)
  crowded = window.copy()
  crowded.window = window.cost - 1
  with pytest.raises(InvariantError, match="budget"):
    check(crowded)


def test_a_hole_and_an_overlap_are_noticed(window):
  e = window.entries
  hole = Entries(*(np.delete(a, 40) for a in e.arrays()))
  overlap = Entries(*(np.insert(a, 40, a[40]) for a in e.arrays()))
  for entries in (hole, overlap):
    broken = window.copy()
    broken.entries = entries
    with pytest.raises(InvariantError, match="contiguity"):
      check(broken)


def test_positions_must_rise_and_fit(window, monkeypatch):
  invariants.check_positions(window, 4, 2048)
  with pytest.raises(InvariantError, match="exceed the base"):
    invariants.check_positions(window, 1, window.cost + 31)
  positions = window.positions(1, 2048)
  positions[7] = positions[8]
  monkeypatch.setattr(window, "positions", lambda *_: positions)
  with pytest.raises(InvariantError, match="monotone"):
    invariants.check_positions(window, 1, 2048)


@pytest.fixture
def tree(tiny_lm, tiny_gistnet):
  return tiny_base.random_tree(tiny_gistnet, 2100, 0)


def spoil_gist(tree, monkeypatch, level, index, change):
  real = tree.gists

  def gists(l, start, stop):
    out = real(l, start, stop)
    if l == level and start <= index < stop:
      out[index - start] = change(out[index - start])
    return out

  monkeypatch.setattr(tree, "gists", gists)


@pytest.mark.parametrize("level, index", [(1, 0), (1, 64), (2, 1)])
@pytest.mark.parametrize("name, change", [
  ("zero gist", lambda g: 0 * g),
  ("gist content", lambda g: g[::-1]),
  ("gist content", lambda g: 1.05 * g),
])
def test_a_wrong_gist_is_noticed(
  tree, tiny_gistnet, monkeypatch, level, index, name, change
):
  invariants.check_tree(tree, tiny_gistnet)
  spoil_gist(tree, monkeypatch, level, index, change)
  with pytest.raises(InvariantError, match=name):
    invariants.check_tree(tree, tiny_gistnet)


def test_a_missing_node_is_noticed(tree, monkeypatch):
  real = tree.num_nodes
  monkeypatch.setattr(tree, "num_nodes", lambda l: real(l) - (l == 1))
  with pytest.raises(InvariantError, match="complete nodes"):
    invariants.check_tree(tree)


# --- Any sequence of public calls --------------------------------------------


class Life:
  """Random work on a MegaContext; every invariant by content after each."""

  def __init__(self, lm, encoder, policy):
    self.lm, self.encoder = lm, encoder
    self.url = tiny_base.memory_url()
    config = Config(
      window=WINDOW, policy=policy, check_invariants=True, recent_tokens=64,
      gists_per_level=8, gist_attention="visible", gist_stride=4,
      settle_steps=3,
    )
    self.mc = MegaContext.create(self.url, lm, config, gistnet=encoder)
    self.ids = np.zeros(0, np.int32)
    self.texts = 0

  @property
  def loop(self):
    return self.mc._loop

  @property
  def window(self):
    return self.loop.context.window

  def text(self, count):
    self.texts += 1
    return tiny_base.text(count, self.texts)

  def remembered(self, text):
    ids = self.lm.tokenizer.encode(text)
    if not len(self.ids):
      ids = np.concatenate([np.array([tiny_base.BOS], np.int32), ids])
    self.ids = np.concatenate([self.ids, ids])

  def ingest(self, pick):
    text = self.text((1, 31, 32, 33, 100, 700, 1500)[pick % 7])
    before = len(self.ids)
    stats = self.mc.ingest(text)
    if stats.skipped:  # two texts of one letter
      assert stats.tokens == 0 and stats.cursor == before
      return
    self.remembered(text)
    assert stats.tokens == len(self.ids) - before
    assert stats.cursor == len(self.ids)

  def generate(self, pick):
    prompt, new = self.text((3, 40, 200, 600)[pick % 4]), 1 + pick % 71
    out = self.mc.generate(prompt, max_new_tokens=new)
    self.remembered(prompt)
    assert len(out.token_ids) == new
    self.ids = np.concatenate([self.ids, out.token_ids])

  def answer(self, pick):
    focus = self.mc.focus()
    self.mc.generate(self.text(1 + pick % 300), 40, remember=False)
    assert self.mc.focus() == focus

  def score(self, pick):
    focus, count = self.mc.focus(), (1, 50, 300)[pick % 3]
    nll = self.mc.score(self.text(count))
    assert nll.shape == (count,)
    assert np.isfinite(nll[0 if len(self.ids) else 1 :]).all()
    assert self.mc.focus() == focus

  def expand(self, pick):
    coarse = np.flatnonzero(self.window.entries.level > 0)
    if len(coarse) and self.window.free >= 2 * BRANCHING:
      self.window.expand(int(coarse[pick % len(coarse)]), self.loop.step)

  def collapse(self, pick):
    groups = np.flatnonzero(self.window.sibling_groups())
    groups = groups[self.window.entries.start()[groups] >= 32]
    if len(groups):
      self.window.collapse(int(groups[pick % len(groups)]), self.loop.step)

  def retile(self, pick):
    self.loop.cold_start((32, 64, 128)[pick % 3])

  def refocus(self, pick):
    self.loop.follow()
    self.loop.refocus((32, 100)[pick % 2])

  def predict(self, pick):
    if len(self.ids):
      assert np.isfinite(self.mc.next_logits()).all()

  def reopen(self, pick):
    self.mc.close()
    focus = self.mc.focus()
    self.mc = MegaContext.open(self.url, self.lm, gistnet=self.encoder)
    if len(focus) <= WINDOW - BRANCHING:
      assert self.mc.focus() == focus

  def check(self):
    tree, context = self.mc.tree, self.loop.context
    cursor = len(self.ids)
    assert self.mc.cursor == tree.cursor == cursor
    np.testing.assert_array_equal(tree.tokens(0, cursor), self.ids)
    invariants.check_window(
      self.window, cursor, max_level=tree.top_level, sink=32
    )
    invariants.check_positions(self.window, 4, self.lm.config.max_positions)
    invariants.check_tree(tree, self.encoder)
    context.load_unready(tree)
    contents(context, tree)
    edges = [0] + [f.stop for f in self.mc.focus()]
    assert [f.start for f in self.mc.focus()] + [cursor] == edges


def contents(context, tree):
  """As `check_contents`, for all entries at once: it is called a lot."""
  e = context.window.entries
  for level in np.unique(e.level):
    rows = np.flatnonzero(e.level == level)
    first, last = int(e.index[rows[0]]), int(e.index[rows[-1]]) + 1
    if level == 0:
      held, expected = context.ids, tree.tokens(first, last)
    else:
      held, expected = context.gists, tree.gists(int(level), first, last)
    np.testing.assert_allclose(
      held[e.slot[rows]], expected[e.index[rows] - first], rtol=1e-6
    )


WORK = (
  "ingest", "generate", "answer", "score", "expand", "expand", "collapse",
  "retile", "refocus", "predict", "reopen",
)


@pytest.mark.parametrize("policy, examples", [
  ("random", 4),
  *marks.further(("random", 12), ("similarity", 6), ("lensnet", 3)),
])
def test_any_life_keeps_every_invariant(
  tiny_lm, tiny_gistnet, policy, examples
):
  steps = st.lists(
    st.tuples(st.sampled_from(WORK), st.integers(0, 9999)),
    min_size=10, max_size=14,
  )
  work = dict(refocus_steps=0, expands=0, collapses=0)

  @settings(max_examples=examples, database=None)
  @given(steps)
  def lives(steps):
    life = Life(tiny_lm, tiny_gistnet, policy)
    life.ingest(4)
    for name, pick in steps:
      getattr(life, name)(pick)
      life.check()
    for name in work:
      work[name] += life.mc.telemetry.counters[name]
    life.mc.close()

  lives()
  if policy != "random":  # wishes for nothing where nothing is asked for
    del work["expands"]
  assert min(work.values()) > 0, work


def test_wrong_contents_are_noticed(memory_url, tiny_lm, tiny_gistnet):
  mc = MegaContext.create(
    memory_url, tiny_lm, Config(window=WINDOW, gist_attention="visible"),
    gistnet=tiny_gistnet,
  )
  mc.ingest(tiny_base.text(1500))
  context = mc._loop.context
  mc.next_logits()
  invariants.check_contents(context, mc.tree)
  e = context.window.entries
  ids, gists = context.ids, context.gists
  for row in (5, int(np.flatnonzero(e.level == 1)[0]), len(e) - 1):
    context.ids, context.gists = ids.copy(), gists.copy()
    context.ids[e.slot[row]] += 1
    context.gists[e.slot[row]] = np.roll(gists[e.slot[row]], 1)
    with pytest.raises(InvariantError, match="tree-window consistency"):
      invariants.check_contents(context, mc.tree)
  context.ids, context.gists = ids, gists
  # Right coverage, wrong content: two gists that changed places.
  gists = np.flatnonzero(e.level == 1)[:2]
  e.slot[gists] = e.slot[gists[::-1]]
  check(context.window, mc.cursor)
  with pytest.raises(InvariantError, match="tree-window consistency"):
    invariants.check_contents(context, mc.tree)
