"""Reading: what text that is read on wishes to see raw."""

import dataclasses

import numpy as np
import pytest

from mcjax import Config, MegaContext
from mcjax.lens import reading
from mcjax.testing import tiny_base
from mcjax.tree import lexical_rank
from mcjax.types import BRANCHING
from mcjax.window.focus_view import FocusView

FAR = 40  # first block of the passage that comes again
TEXT = tiny_base.text(4000, seed=3)  # with <bos> one token each
PASSAGE = TEXT[FAR * BRANCHING - 1 : (FAR + 4) * BRANCHING - 1]


def opened(tiny_lm, tiny_gistnet, text):
  mc = MegaContext.create(
    tiny_base.memory_url(), tiny_lm,
    Config(window=512, policy="lensnet", recent_tokens=64, gists_per_level=8),
    gistnet=tiny_gistnet,
  )
  mc.ingest(text)
  return mc


def view_of(mc, query=None):
  window, own = mc._loop.context.window, mc._loop.query
  ids = own.ids if query is None else query
  weights = own.weights if query is None else np.ones(len(ids), np.float32)
  start = own.start if query is None else mc.cursor
  return FocusView(window.entries, mc.tree, ids, weights, start, False, 0,
                   False, context_lm=mc._loop.context)


def test_a_repeated_passage_wishes_for_what_followed_it(tiny_lm, tiny_gistnet):
  again = TEXT + PASSAGE[: 2 * BRANCHING]
  mc = opened(tiny_lm, tiny_gistnet, again)
  got = reading.continuations(view_of(mc), range(mc.cursor // BRANCHING))
  assert max(got, key=got.get) == FAR + 2  # the third of its blocks comes next
  assert got[FAR + 2] == pytest.approx(1)
  wished = reading.wishes(view_of(mc), [], [FAR + 1])
  assert wished[FAR + 2] == pytest.approx(1)
  assert len(wished) <= reading.WISHES


def test_text_that_repeats_nothing_wishes_for_nothing(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, TEXT)
  mc._loop.cold_start(250)
  view = view_of(mc)
  blocks = range(mc.cursor // BRANCHING)
  assert reading.continuations(view, blocks) == {}
  assert reading.novelty(view, blocks) == {}  # its letters are in the window
  assert reading.wishes(view, blocks, blocks) == {}


def test_a_passage_that_is_raw_anyway_is_not_wished_for(tiny_lm, tiny_gistnet):
  part = PASSAGE[: 2 * BRANCHING]
  mc = opened(tiny_lm, tiny_gistnet, TEXT + part + part)
  mc._loop.cold_start(200)  # the first repetition is raw
  view = view_of(mc)
  start = int(view.entries.start()[reading.newest_raw(view.entries)])
  assert start <= len(TEXT) + 1 - BRANCHING
  assert reading.continuations(view, range(mc.cursor // BRANCHING)) == {}


def test_novelty_is_for_a_topic_the_window_lacks(tiny_lm, tiny_gistnet):
  topic = "ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEF"
  at = FAR * BRANCHING - 1
  mc = opened(tiny_lm, tiny_gistnet,
              TEXT[:at] + topic + TEXT[at + len(topic) :])
  query = mc.tree.tokens(FAR * BRANCHING, (FAR + 1) * BRANCHING)
  view = view_of(mc, query)
  got = reading.novelty(view, [FAR, FAR + 2])
  assert got[FAR] == pytest.approx(1, abs=0.01)
  assert reading.wishes(view, [FAR], [])[FAR] == 0.5
  # half of the query's weight is in the newest raw text: no change of topic
  first = reading.newest_raw(view.entries)
  known = mc.tree.tokens(int(view.entries.start()[first]), mc.cursor)[:32]
  mixed = np.concatenate([query, *[known] * 200])
  weights = lexical_rank.query_weights(
    mc.tree, mixed, np.ones(len(mixed), np.float32))
  assert weights[32:].sum() > weights[:32].sum()
  mixed_view = dataclasses.replace(
    view, query_ids=mixed, query_weights=np.ones(len(mixed), np.float32))
  assert reading.novelty(mixed_view, [FAR]) == {}
