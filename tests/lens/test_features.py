"""What LensNet is shown: rows, their matches with the query, the tail."""

import dataclasses

from lens_cases import asked_view, opened, view_of
import numpy as np
import pytest

from mcjax.lens import features as lens_features
from mcjax.lens.features import (
  BURIED,
  FEATURES,
  GIST,
  NAMES,
  RAW,
  TAIL_GISTS,
  Rows,
)
from mcjax.testing import tiny_base
from mcjax.window.working_context import WorkingContext


def column(features, name):
  return features[:, NAMES.index(name)]


def rows_of(*blocks, state=BURIED):
  n = len(blocks)
  return Rows(np.array(blocks, np.int64), np.full(n, state, np.int32),
              np.zeros(n, np.int64))


def prepared(mc, view):
  policy = mc._loop._policy
  policy._prepare(view)
  return policy


def test_rows_are_blocks_raw_as_gists_or_buried():
  window = WorkingContext(512)
  nodes = [(0, i) for i in range(32)] + [(1, i) for i in range(1, 32)]
  nodes += [(2, 1)] + [(0, 2048 + i) for i in range(40)]
  window.retile(nodes)
  rows = lens_features.window_rows(window, [33, 5, 63, 64, 33], 1 << 30)
  np.testing.assert_array_equal(rows.block, [0, 64, *range(1, 32), 33, 63])
  np.testing.assert_array_equal(rows.state, [RAW] * 2 + [GIST] * 31
                                + [BURIED] * 2)
  np.testing.assert_array_equal(rows.entry[[0, 1, 2, -1]], [0, 64, 32, 63])


def test_inputs_hold_matches_gists_and_tail(tiny_lm, tiny_gistnet):
  text = tiny_base.text(2109)
  fact = "THE PUMP CODE IS 7314."
  mc = opened(tiny_lm, tiny_gistnet, 0,
              text=text[:1030] + fact + text[1030 + len(fact) :])
  view = asked_view(mc, "what is the pump code?")
  policy = prepared(mc, view)
  tail = lens_features.read_tail(
    mc.tree, mc._loop.context.token_embeddings, policy._query)
  got = lens_features.gather(
    mc.tree, rows_of(0, 32, 33, 60), 8, policy._query, policy._matcher, tail)
  assert got.features.shape == (8, FEATURES) and got.mask.sum() == 4
  exact = column(got.features, "exact_own")[:4]
  assert exact[1] == exact.max() > 0.5
  assert column(got.features, "rank_exact_near")[1] == 1.0
  assert (column(got.features, "asked")[:4] == 1).all()
  np.testing.assert_array_equal(got.gists[1], mc.tree.gists(1, 32, 33)[0])
  coarse, fine = mc.tree.gists(2, 0, 2), mc.tree.gists(1, 61, 65)
  np.testing.assert_array_equal(got.tail[:2], coarse)
  np.testing.assert_array_equal(got.tail[2:TAIL_GISTS], fine)
  ids = mc.tree.tokens(mc.cursor - 32, mc.cursor)
  table = np.asarray(tiny_lm.params["embed"])
  np.testing.assert_array_equal(got.tail[TAIL_GISTS + 1 :], table[ids])
  assert got.tail_mask.all()


def test_every_feature_is_finite_and_says_something(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 3000)
  blocks = Rows(np.arange(80), np.resize([RAW, GIST, BURIED], 80).astype(
    np.int32), np.zeros(80, np.int64))
  seen = []
  words = mc.text(960, 1040).split()[1:-1]  # whole ones
  asked = asked_view(mc, " ".join(words) + "?")
  before = np.asarray(mc.lm.tokenizer.encode("a word no text has"), np.int32)
  for view in (asked, view_of(mc),
               dataclasses.replace(asked, query_ids=asked.query_ids.copy(),
                                   query_before=before)):
    policy = prepared(mc, view)
    seen.append(lens_features.row_features(
      mc.tree, blocks, policy._query, policy._matcher))
  values = np.concatenate(seen)
  assert np.isfinite(values).all()
  still = [name for name, column in zip(NAMES, values.T)
           if column.min() == column.max()]
  assert set(still) <= {"said_by_user", "said_by_model", "special",
                        "question_mark", "known", "top_pairs", "pairs_own",
                        "within_256"}


def test_what_is_shown_raw_is_not_new(tiny_lm, tiny_gistnet):
  text = tiny_base.text(2000)
  word = " HARBOURMASTER "
  mc = opened(tiny_lm, tiny_gistnet, 0,
              text=text[:640] + word + text[640:1280] + word + text[1280:])
  policy = prepared(mc, asked_view(mc, "harbourmaster"))
  blocks = rows_of(20, 40)
  hidden = lens_features.row_features(
    mc.tree, blocks, policy._query, policy._matcher)
  shown = lens_features.row_features(
    mc.tree, Rows(blocks.block, np.array([BURIED, RAW], np.int32),
                  blocks.entry),
    policy._query, policy._matcher)
  assert column(hidden, "new_near")[0] > column(shown, "new_near")[0]


def test_a_prompt_that_leans_on_the_turn_before_it_matches_both(
    tiny_lm, tiny_gistnet):
  text = tiny_base.text(3000)
  told = "THE HARBOUR OF QUENFORD WAS DREDGED IN JULY. "
  other = "THE HARBOUR OF ASHAMO WAS DREDGED IN MARCH. "
  mc = opened(tiny_lm, tiny_gistnet, 0,
              text=text[:640] + other + text[640:1600] + told + text[1600:])
  view = asked_view(mc, "when was the harbour dredged there?")
  before = np.asarray(mc.lm.tokenizer.encode("who runs quenford?"), np.int32)
  other_block, told_block = 640 // 32, (1600 + len(other)) // 32
  alone, joined = [
    lens_features.row_features(
      mc.tree, rows_of(other_block, told_block), policy._query,
      policy._matcher)
    for policy in (prepared(mc, v) for v in (
      view, dataclasses.replace(
        asked_view(mc, "when was the harbour dredged there?"),
        query_before=before)))]
  assert (column(alone, "before") == 0).all()
  assert (column(joined, "before") > 0).all()
  for name in ("exact_near", "times_near", "known"):  # the prompt's own words
    np.testing.assert_array_equal(column(alone, name), column(joined, name))
  np.testing.assert_array_equal(
    column(alone, "joined_exact_near"), column(alone, "exact_near"))
  near = column(joined, "joined_exact_near")
  assert near[1] > near[0]
  assert column(alone, "exact_near")[1] <= column(alone, "exact_near")[0] + 0.01


def test_a_passage_that_is_repeated_foretells_what_follows(
    tiny_lm, tiny_gistnet):
  text = tiny_base.text(3000)
  again = text[500:590]
  mc = opened(tiny_lm, tiny_gistnet, 0, text=text + again)
  policy = prepared(mc, view_of(mc))
  near = np.arange(14, 24)
  repeats = column(lens_features.row_features(
    mc.tree, rows_of(*near), policy._query, policy._matcher), "repeats")
  assert repeats.max() > 0.8
  assert near[repeats.argmax()] in (18, 19)


def test_what_is_being_copied_is_known_where_it_is_shown_raw(
    tiny_lm, tiny_gistnet):
  text = tiny_base.text(3000)
  mc = opened(tiny_lm, tiny_gistnet, 0, text=text + text[2600:2690])
  policy = prepared(mc, view_of(mc))
  newest = rows_of(*range(70, 96), state=RAW)
  repeats = column(lens_features.row_features(
    mc.tree, newest, policy._query, policy._matcher), "repeats")
  assert repeats.max() > 0.8
  assert newest.block[repeats.argmax()] in (84, 85)


def test_a_short_history_has_a_short_tail(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 20)
  query = prepared(mc, view_of(mc))._query
  tail, mask = lens_features.read_tail(
    mc.tree, mc._loop.context.token_embeddings, query)
  assert not mask[:TAIL_GISTS].any() and mask[TAIL_GISTS]
  np.testing.assert_array_equal(tail[TAIL_GISTS], query.gist)
  assert mask[TAIL_GISTS + 1 :].sum() == 21 and np.isfinite(tail).all()


@pytest.mark.parametrize("question", ["", "?", "the the the", "x" * 400])
def test_odd_queries_are_read(tiny_lm, tiny_gistnet, question):
  mc = opened(tiny_lm, tiny_gistnet, 2000)
  policy = prepared(mc, asked_view(mc, question))
  found = lens_features.row_features(
    mc.tree, rows_of(3, 5), policy._query, policy._matcher)
  assert np.isfinite(found).all()
