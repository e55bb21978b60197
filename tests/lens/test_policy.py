"""LensNet as a policy: what it wishes for, reads and gives up."""

import dataclasses

from lens_cases import opened, view_of
import numpy as np
import pytest

from mcjax.answer import passages
from mcjax.lens import features as lens_rows
from mcjax.lens import meaning, reading
from mcjax.lens import network as lensnet
from mcjax.lens import policy as lensnet_policy
from mcjax.lens.features import GIST, RAW
from mcjax.lens.keyer import LensKeyer
from mcjax.testing import tiny_base
from mcjax.tree import lexical_rank
from mcjax.types import BRANCHING, McjaxError


def asked_view(mc, question):
  """The view of a question about the history as it is."""
  ids = mc.lm.tokenizer.encode(question)
  return dataclasses.replace(
    view_of(mc, query_start=mc.cursor), asked=True, query_ids=ids,
    query_weights=np.ones(len(ids), np.float32))


def buried_rows(mc, *offsets):
  """The window's rows and blocks below its first L2 entry; that entry."""
  e = mc._loop.context.window.entries
  coarse = int(np.flatnonzero(e.level == 2)[0])
  found = [int(e.index[coarse]) * 32 + k for k in offsets]
  return lens_rows.window_rows(mc._loop.context.window, found), coarse, found


def read(view, blocks):
  """What the blocks say on the view's question."""
  weights = lexical_rank.query_weights(
    view.tree, view.query_ids, view.query_weights)
  return passages.find_passages(
    view.tree, view.context_lm.lm.tokenizer, blocks, view.query_ids, weights,
    view.query_start)


def answer_scores(view, rows, scores):
  answers = lensnet_policy.find_answers(view, rows, scores, read)
  return lensnet_policy.entry_scores(view, rows, scores, answers=answers)


def test_an_answer_is_wished_for_and_other_raw_text_offered(
  tiny_lm, tiny_gistnet
):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  rows, coarse, found = buried_rows(mc, 3, 9)
  start = found[1] * BRANCHING
  words = mc.lm.tokenizer.decode(mc.tree.tokens(start, start + 9))
  view = asked_view(mc, words)
  scores = np.linspace(-0.1, 0.3, len(rows)).astype(np.float32)
  scores[-2:] = [0.4, 0.7]
  out = answer_scores(view, rows, scores)
  assert len(out) == len(view.entries)
  assert out[coarse] == np.float32(0.7)  # a coarse entry inherits
  assert (np.delete(out, coarse) <= 0).all()
  for at in rows.entry[rows.state == RAW]:
    assert (out[at : at + 32] <= -0.3).all()


def test_what_shares_little_of_the_question_is_no_rival(tiny_lm, tiny_gistnet):
  text = tiny_base.text(4000)
  fact, other = "THE PUMP CODE IS 7314.", "THE ROPE IS BLUE."
  mc = opened(tiny_lm, tiny_gistnet, 4000, text=(
    text[:1223] + other + text[1223 + len(other) : 1330] + fact
    + text[1330 + len(fact) :]))
  rows, coarse, _ = buried_rows(mc, 6, 9)
  view = asked_view(mc, "PUMP CODE")
  scores = np.full(len(rows), -0.1, np.float32)
  scores[-2:] = [0.8, 0.7]  # LensNet prefers the other one
  assert rows.block[-2:].tolist() == [38, 41]
  out = answer_scores(view, rows, scores)
  assert out[coarse] == np.float32(0.7)


def test_the_questions_own_blocks_stay(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  rows, _, _ = buried_rows(mc, 3)
  newest = int(rows.block[rows.state == RAW].max())
  view = dataclasses.replace(
    asked_view(mc, "x"), query_start=newest * BRANCHING - 5)
  scores = np.full(len(rows), -0.9, np.float32)
  scores[-1] = 0.7
  scores[rows.block == newest] = 0.9  # it is no answer to itself
  out = answer_scores(view, rows, scores)
  own = rows.entry[(rows.state == RAW) & (rows.block >= newest - 1)]
  assert len(own) == 2
  for at in own:
    assert (out[at : at + 32] == 0).all()


def test_text_read_on_gives_up_least_worth_first(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  view = view_of(mc)
  e = view.entries
  rows = lens_rows.window_rows(mc._loop.context.window, [])
  scores = np.linspace(-0.9, 0.9, len(rows)).astype(np.float32)
  out = lensnet_policy.entry_scores(view, rows, scores, {})
  newest = reading.newest_raw(e)
  assert (np.abs(out) < 0.2).all()  # nothing moves but to make room
  gists = rows.entry[rows.state == GIST]
  near = np.sort(rows.entry[(rows.state == RAW) & (rows.entry >= newest)])
  assert out[gists].max() < out[near].min()
  assert (np.diff(out[near]) > 0).all()  # the oldest goes first
  np.testing.assert_array_equal(  # among gists LensNet says which
    np.argsort(out[gists]), np.argsort(scores[rows.state == GIST]))


def test_text_gets_its_few_best_wishes_and_pays_for_them(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  window = mc._loop.context.window
  view = view_of(mc)
  rows = lens_rows.window_rows(window, [])
  scores = np.zeros(len(rows), np.float32)
  gists = np.flatnonzero(rows.state == GIST)
  many = {int(rows.block[row]): 0.7 - 0.01 * i for i, row in enumerate(gists)}
  out = lensnet_policy.entry_scores(view, rows, scores, many)
  assert (out > 0.2).sum() == 4  # few wishes at one time, the best ones
  assert (out[rows.entry[gists[:4]]] > 0.2).all()
  out = lensnet_policy.entry_scores(view, rows, scores, {})
  assert (out < 0.2).all()
  window.append_tokens(window.take_slots(window.free - 40))
  view = dataclasses.replace(view, entries=window.entries)
  one = {int(rows.block[gists[0]]): 0.5}
  out = lensnet_policy.entry_scores(view, rows, scores, one)
  wished = rows.entry[gists[0]]
  assert out[wished] > 0.2
  assert (np.delete(out, wished) < -0.2).all()  # it must be paid for


def test_a_question_without_an_answer_wishes_by_lensnet(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  view = dataclasses.replace(view_of(mc), asked=True)
  rows = lens_rows.window_rows(mc._loop.context.window, [])
  scores = np.full(len(rows), -0.9, np.float32)
  few = np.flatnonzero(rows.state == GIST)[:2]
  scores[few] = [0.3, 0.2]
  assert lensnet_policy.find_answers(view, rows, scores, read) == {}
  out = lensnet_policy.entry_scores(view, rows, scores)
  assert (out[rows.entry[few]] > 0.2).all()
  assert (np.delete(out, rows.entry[few]) < 0.2).all()


def meaning_policy(lm, encoder):
  """Keys to which a letter means the same in upper and in lower case."""
  config = lensnet.LensNetConfig(d_model=lm.config.d_model)
  params = lensnet.init_params(config)
  rng = np.random.RandomState(7)
  vectors = rng.randint(-127, 128, (lm.config.vocab_size, 32))
  salience = np.full((lm.config.vocab_size, 2), 0.01, np.float32)
  for letter in "abcdefghijklmnopqrstuvwxyz":
    low, high = (lm.tokenizer.encode(c)[0] for c in (letter, letter.upper()))
    vectors[high] = vectors[low]
    salience[[low, high]] = 1
  params["table"] = {"vectors": vectors.astype(np.int8), "salience": salience}
  return lensnet_policy.LensNetPolicy(config, params, lm, encoder, {})


def lines_around(fact, at, size=4000):
  """Lines of digits with a fact in place of the `at`-th character on."""
  text = "".join(f"{i:015d}\n" for i in range(size // 16))
  return text[: at - 1] + "\n" + fact + "\n" + text[at + 1 + len(fact) :]


FACT = "THE FERRY SKIPPER GROWS ROSES."


def test_what_no_word_finds_is_found_by_meaning(tiny_lm, tiny_gistnet):
  policy = meaning_policy(tiny_lm, tiny_gistnet)
  mc = opened(tiny_lm, tiny_gistnet, 4000, text=lines_around(FACT, 1300),
              policy=policy)
  view = asked_view(mc, "skipper")
  scores = policy.score(view)
  a, b = policy.sources[0]
  assert len(policy.sources) == 1 and mc.text(a, b).strip() == FACT
  coarse = view.entries.level > 0
  start = view.entries.start()
  above = np.searchsorted(start, [a, b - 1], side="right") - 1
  assert coarse[above].all() and (scores[above] > 0.5).all()
  policy.by_meaning = False
  assert (policy.score(view)[above] < 0.5).all() and not policy.sources


def test_what_words_surely_answer_is_not_looked_for_by_meaning(
  tiny_lm, tiny_gistnet, monkeypatch
):
  policy = meaning_policy(tiny_lm, tiny_gistnet)
  mc = opened(tiny_lm, tiny_gistnet, 4000, text=lines_around(FACT, 1300),
              policy=policy)
  monkeypatch.setattr(
    policy, "score_rows", lambda view, rows: np.full(len(rows), 0.9))
  looked = []
  monkeypatch.setattr(
    meaning, "find_alike", lambda *given: looked.append(1) or {})
  policy.score(asked_view(mc, "SKIPPER GROWS ROSES"))
  assert policy.sources and not looked
  other = asked_view(mc, "skipper grows roses")
  policy.score(other)
  assert len(looked) == 1 and not policy.sources  # blanks alone are no answer
  policy.score(dataclasses.replace(other, step=1))
  assert len(looked) == 1  # once for a question
  policy.score(asked_view(mc, "skipper grows roses"))
  assert len(looked) == 2


def test_the_policy_scores_what_is_there(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  policy = mc._loop._policy
  scores = policy.score(view_of(mc))
  assert len(scores) == len(mc.focus()) and np.abs(scores).max() <= 1
  assert policy.card is None
  assert 0 < policy.touched <= 256 + mc.tree.num_nodes(1)
  assert policy.bytes_read > 0


def test_keys_are_read_once_while_a_question_is_answered(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  policy, view = mc._loop._policy, asked_view(mc, "what?")
  found = policy._by_keys(view)
  assert policy.touched == mc.cursor // BRANCHING == 125
  mc.ingest(tiny_base.text(70, 1))
  assert policy._by_keys(view) == found and policy.touched == 125
  policy._by_keys(asked_view(mc, "what?"))
  assert policy.touched == 125 + mc.cursor // BRANCHING


def test_beyond_the_scan_a_bounded_search_takes_over(
  tiny_lm, tiny_gistnet, monkeypatch
):
  mc = opened(tiny_lm, tiny_gistnet, 5000)
  policy = mc._loop._policy
  all_read = policy._by_keys(view_of(mc))
  monkeypatch.setattr(lensnet_policy, "_SCAN", 0)
  policy._query = None
  policy._max_nodes = 1 << 20
  assert policy._by_keys(view_of(mc)) == all_read
  policy._query, policy._max_nodes, policy.touched = None, 64, 0
  policy._by_keys(view_of(mc))
  assert policy.touched <= 64


def test_weights_are_saved_and_loaded(tiny_lm, tiny_gistnet, tmp_path):
  config = lensnet.LensNetConfig(d_model=32, width=16, heads=2)
  params = lensnet.init_params(config, seed=5)
  path = tmp_path / "lensnet.safetensors"
  lensnet_policy.save_lensnet(path, params, config, {"note": "x"})
  policy = lensnet_policy.load_lensnet(tiny_lm, path, gistnet=tiny_gistnet)
  assert policy.card and policy.config == config
  same = LensKeyer(params, config, tiny_lm)
  assert policy.keyer.fingerprint == same.fingerprint
  other = lensnet.LensNetConfig(d_model=16)
  lensnet_policy.save_lensnet(path, lensnet.init_params(other), other, {})
  with pytest.raises(McjaxError, match="reads vectors of 16"):
    lensnet_policy.load_lensnet(tiny_lm, path, gistnet=tiny_gistnet)
