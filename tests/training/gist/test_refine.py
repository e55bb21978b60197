"""Gists of a tree are fitted span by span, committed, and survive kills."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mcjax import Config, MegaContext
from mcjax.testing import tiny_base
from mcjax.training.gist.refine import Refiner, Settings
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

_QUICK = Settings(continuations=2, held_out=2, continued=16, batch=2, steps=2)


def _tree(encoder, tokens=2 * 1024 + 300):
  return tiny_base.random_tree(encoder, tokens, seed=1)


def test_fitted_gists_are_better_or_left_as_they_are(lm, encoder):
  tree = _tree(encoder)
  before = tree.gists(1, 0, tree.num_nodes(1))
  refiner = Refiner(tree, lm, encoder, _QUICK)
  fitted = refiner.run(60.0, 256, 1024)
  after = tree.gists(1, 0, tree.num_nodes(1))
  assert sorted(f.start for f in fitted) == [8, 16, 24]
  assert any(f.replaced for f in fitted)
  for f in fitted:
    span = slice(f.start, f.start + 8)
    np.testing.assert_array_equal(after[span], f.new)
    changed = not np.array_equal(before[span], after[span])
    assert changed == f.replaced == (f.after < f.before)
  np.testing.assert_array_equal(after[:8], before[:8])
  np.testing.assert_array_equal(after[32:], before[32:])
  assert tree.refined == [(8, 32)]
  found = refiner.recovered(fitted)
  assert set(found) == {"before", "after"} and found["after"]["n"] == 3


def test_most_read_spans_go_first_and_none_without_a_parent(lm, encoder):
  tree = _tree(encoder)
  tree.record_access(np.array([1, 1, 0]), np.array([9, 9, 40 * 32]))
  refiner = Refiner(tree, lm, encoder, _QUICK)
  todo = refiner.todo()
  assert todo == [8, 40, 56, 48, 32, 24, 16, 0]  # 64 to 73 have no parent yet
  assert refiner.todo(300, 1600) == [40, 32, 24, 16]
  refiner.run(0.0)
  assert tree.refined == []


def test_worse_gists_are_not_stored(lm, encoder):
  tree = _tree(encoder)
  wild = Settings(continuations=2, held_out=2, continued=16, batch=2, steps=2,
                  rate=50.0)
  before = tree.gists(1, 0, tree.num_nodes(1))
  fitted = Refiner(tree, lm, encoder, wild).run(60.0)
  kept = [f for f in fitted if not f.replaced]
  after = tree.gists(1, 0, tree.num_nodes(1))
  assert len(fitted) == 8 and kept
  for f in kept:
    assert f.after >= f.before
    span = slice(f.start, f.start + 8)
    np.testing.assert_array_equal(after[span], before[span])
  assert tree.refined == [(0, 64)], "none is tried again"


def test_a_planted_fact_is_still_found(lm, encoder, memory_url):
  config = Config(window=512, policy="lensnet", chat="plain")
  with MegaContext.create(
      memory_url, lm, config, encoder) as mc:
    fact = "zebra quartz jukebox vex."
    mc.ingest(tiny_base.text(1200) + fact + tiny_base.text(1000, seed=2))
    before = mc.search("zebra quartz jukebox")[0]
    Refiner(mc.tree, lm, encoder, _QUICK).run(60.0, 1024, 1536)
    assert mc.tree.refined == [(32, 48)]
    found = mc.search("zebra quartz jukebox")[0]
    assert (found.start, found.stop) == (before.start, before.stop)
    assert "zebra" in found.text
    assert np.isfinite(mc.score("zebra quartz ")).all()


_CHILD = """
import dataclasses, sys
from mcjax.testing import tiny_base
from mcjax.training.gist.refine import Refiner, Settings
from mcjax.tree.tree import MegaContextTree
lm = tiny_base.make_lm()
encoder = tiny_base.gistnet(lm, spread=0.05)
tree = MegaContextTree.open(sys.argv[1], base_fingerprint="tiny",
                            base_name="tiny", encoder=encoder)
settings = Settings(continuations=2, held_out=2, continued=16, batch=2,
                    steps=2, commit_every=0.0)
Refiner(tree, lm, encoder, settings).run(
  600.0, report=lambda fitted, left: print(fitted.start, flush=True))
"""


def test_a_kill_leaves_a_tree_that_opens_and_goes_on(
    lm, encoder, tmp_path):
  url = str(tmp_path / "tree")
  names = dict(base_fingerprint="tiny", base_name="tiny", encoder=encoder)
  ids = np.random.RandomState(0).randint(0, 256, 64 * 1024)
  with MegaContextTree.create(
      url, vocab_size=tiny_base.VOCAB, **names) as tree:
    tree.append(ids)
    tree.commit()
    before = tree.gists(1, 0, tree.num_nodes(1))
  with subprocess.Popen([sys.executable, "-c", _CHILD, url],
                        stdout=subprocess.PIPE, text=True) as child:
    assert child.stdout is not None
    said = [int(child.stdout.readline()) for _ in range(5)]
    os.kill(child.pid, signal.SIGKILL)
    said += [int(line) for line in child.stdout.read().split()]
  with MegaContextTree.open(url, **names) as tree:
    done = sum(b - a for a, b in tree.refined) // 8
    assert 4 <= done <= len(said)
    after = tree.gists(1, 0, tree.num_nodes(1))
    changed = np.flatnonzero((before != after).any(axis=1)) // 8 * 8
    assert 0 < len(set(changed)) and set(changed) <= set(said[:done])
    np.testing.assert_array_equal(tree.tokens(0, len(ids)), ids)
    todo = Refiner(tree, lm, encoder, _QUICK).todo()
    assert len(todo) == 64 * 4 - done and not set(todo) & set(said[:done])


@pytest.mark.parametrize("field, value", [
  ("blocks", 5), ("batch", 9), ("held_out", 0)])
def test_settings_that_make_no_sense_are_named(field, value):
  with pytest.raises(McjaxError, match=field):
    Settings(**{field: value})
