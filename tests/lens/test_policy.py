"""LensNet as a policy: what it looks at, wishes for, reads and gives up."""

import dataclasses

from lens_cases import asked_view, opened, view_of
import numpy as np
import pytest

from mcjax import Config, MegaContext
from mcjax.focus.policy import WISH, age_scores
from mcjax.lens import features as lens_features
from mcjax.lens import network as lensnet
from mcjax.lens import policy as lensnet_policy
from mcjax.lens import weights
from mcjax.lens.features import BURIED, GIST, RAW, Rows
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING, McjaxError

FACT = "THE PUMP CODE IS 7314."


def buried_rows(mc, *offsets):
  """The window's rows and blocks below its first L2 entry; that entry."""
  e = mc._loop.context.window.entries
  coarse = int(np.flatnonzero(e.level == 2)[0])
  found = [int(e.index[coarse]) * 32 + k for k in offsets]
  rows = lens_features.window_rows(
    mc._loop.context.window, found, mc.cursor)
  return rows, coarse, found


def test_a_coarse_entry_inherits_the_best_wish_below_it(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  rows, coarse, _ = buried_rows(mc, 3, 9)
  view = asked_view(mc, "x")
  scores = np.full(len(rows), -0.5, np.float32)
  scores[-2:] = [0.4, 0.7]
  out = lensnet_policy.entry_scores(view, rows, scores)
  assert len(out) == len(view.entries)
  assert out[coarse] == np.float32(0.7)
  assert (np.delete(out, coarse) <= 0).all()


def test_nothing_moves_without_a_wish(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  for view in (view_of(mc), asked_view(mc, "x")):
    rows = lens_features.window_rows(
      mc._loop.context.window, [], mc.cursor)
    out = lensnet_policy.entry_scores(
      view, rows, np.full(len(rows), -0.9, np.float32))
    assert (np.abs(out) < WISH).all()


def test_what_is_worth_least_pays_for_a_wish(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000, recent_tokens=256)
  rows, coarse, _ = buried_rows(mc, 3)
  view = dataclasses.replace(asked_view(mc, "x"), room=0)
  raw = np.flatnonzero(rows.state == RAW)
  scores = np.full(len(rows), -0.1, np.float32)
  scores[-1] = 0.8
  free = [r for r in raw if view.can_collapse[rows.entry[r]]]
  scores[free] = np.linspace(0.1, -0.15, len(free))
  out = lensnet_policy.entry_scores(view, rows, scores)
  group = [out[rows.entry[r] : rows.entry[r] + 32].mean() for r in free]
  assert sum(g < -WISH for g in group) == 1  # one wish, one that pays
  assert group[-1] < -WISH and out[coarse] == np.float32(0.8)


def test_free_slots_pay_first(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  rows, coarse, _ = buried_rows(mc, 3)
  view = asked_view(mc, "x")
  assert view.room >= BRANCHING
  scores = np.full(len(rows), -0.1, np.float32)
  scores[-1] = 0.8
  out = lensnet_policy.entry_scores(view, rows, scores)
  assert (np.delete(out, coarse) > -WISH).all()


def test_the_questions_own_blocks_count_for_nothing(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 4000)
  window = mc._loop.context.window
  every = lens_features.window_rows(window, [], mc.cursor)
  newest = int(every.block[every.state == RAW].max())
  stop = newest * BRANCHING - 5
  rows = lens_features.window_rows(window, [], stop)
  assert set(every.block) - set(rows.block) == {newest - 1, newest}
  view = dataclasses.replace(asked_view(mc, "x"), query_start=stop)
  out = lensnet_policy.entry_scores(
    view, rows, np.full(len(rows), 0.9, np.float32))
  for at in every.entry[every.block >= newest - 1]:
    np.testing.assert_array_equal(
      out[at : at + 32], age_scores(view)[at : at + 32])


def test_a_prompt_in_the_tree_is_scored_as_one_that_is_not(
    tiny_lm, tiny_gistnet):
  """Training asks about a tree without the prompt, the loop after it."""
  question = "Which harbour has the HARBOURMASTER of 1903, and who is that?"
  mc = opened(tiny_lm, tiny_gistnet, 3200)
  policy = mc._loop._policy
  blocks = np.arange(mc.cursor // BRANCHING)
  rows = Rows(blocks, np.resize([RAW, BURIED], len(blocks)).astype(np.int32),
              np.zeros(len(blocks), np.int64))
  found = []
  for text in ("", f" {question} " * 3):
    if text:
      mc.ingest(text)
    view = dataclasses.replace(
      asked_view(mc, question), query_start=len(blocks) * BRANCHING)
    policy._prepare(view)
    found.append(lens_features.row_features(
      mc.tree, rows, policy._query, policy._matcher))
  np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_both_searches_find_a_fact(tiny_lm, tiny_gistnet):
  text = tiny_base.text(40_000, 3)
  mc = opened(tiny_lm, tiny_gistnet, 0,
              text=text[:20_000] + FACT + text[20_000 + len(FACT) :])
  policy = mc._loop._policy
  view = asked_view(mc, "what is the pump code?")
  scores = policy.score(view)
  assert policy.touched <= 2 * 24 * 256 + mc.tree.num_nodes(1)
  assert np.isfinite(scores).all()
  assert (20_001 // BRANCHING) in policy._finder.blocks()


def test_beyond_a_million_tokens_the_keys_are_searched(
    tiny_lm, tiny_gistnet, monkeypatch):
  mc = opened(tiny_lm, tiny_gistnet, 40_000)
  policy = mc._loop._policy
  monkeypatch.setattr(lensnet_policy, "_SCAN", 100)
  policy.bind(tiny_gistnet, dataclasses.replace(
    mc.config, search_nodes=64, settle_steps=3))
  for _ in range(3):
    policy.score(asked_view(mc, mc.text(9000, 9030)))
    assert 0 < policy.touched <= 2 * 3 * 64


def test_a_prompt_is_searched_for_once_and_its_blocks_are_scored_once(
    tiny_lm, tiny_gistnet, monkeypatch):
  mc = opened(tiny_lm, tiny_gistnet, 40_000)
  policy = mc._loop._policy
  scored = []
  monkeypatch.setattr(
    policy, "score_rows", lambda view, rows, score=policy.score_rows: (
      scored.append(len(rows)), score(view, rows))[1])
  view = asked_view(mc, mc.text(9000, 9030))
  touched = []
  for _ in range(4):
    policy.score(view)
    touched.append(policy.touched)
  assert len(scored) == 1
  assert touched[0] > 256 and not any(touched[1:])


def test_text_that_is_read_on_is_searched_for_step_by_step(
    tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 40_000)
  policy = mc._loop._policy
  view = dataclasses.replace(
    asked_view(mc, mc.text(9000, 9030)), asked=False)
  policy.score(view)
  policy.score(view)
  assert 0 < policy.touched <= 2 * 256


def test_what_is_forgotten_is_not_found(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 3000)
  mc.ingest(f"{FACT} " * 6, name="secret")
  mc.ingest(tiny_base.text(3000, 5))
  document = mc.documents()[1]
  policy = mc._loop._policy
  view = asked_view(mc, "pump code")
  policy.score(view)
  inside = range(document.start // 32 + 1, document.stop // 32 - 1)
  assert set(inside) & set(policy._finder.blocks())
  mc.forget("secret")
  policy.score(asked_view(mc, "pump code"))
  assert not set(inside) & set(policy._finder.blocks())


def test_sources_are_read_only_where_the_history_answers(
    tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 3000)
  policy = mc._loop._policy
  policy.score(asked_view(mc, mc.text(600, 640)))
  policy._chosen = policy._choose([(20, 0.9)])
  policy.answerable = 0.9
  assert policy.sources
  policy.answerable = 0.1
  assert policy.sources == ()
  assert policy._choose([]) == ()


def test_weights_come_back_and_older_ones_are_named(
    tiny_lm, tiny_gistnet, tmp_path):
  config = lensnet.LensNetConfig(d_model=tiny_lm.config.d_model)
  params = lensnet.init_params(config, seed=3)
  path = tmp_path / "lens.safetensors"
  weights.save_lensnet(path, params, config, {"gistnet": "x"})
  policy = lensnet_policy.load_lensnet(tiny_lm, path, gistnet=tiny_gistnet)
  np.testing.assert_array_equal(
    policy.params["score"]["slope"], params["score"]["slope"])
  assert not policy.reads(tiny_gistnet)
  older = dataclasses.replace(config, features=25)
  weights.save_lensnet(path, params, older, {})
  with pytest.raises(McjaxError, match="25 features.*train it again"):
    lensnet_policy.load_lensnet(tiny_lm, path, gistnet=tiny_gistnet)
  assert "score" not in weights.read_initial(tiny_lm, path)[0]
  other = dataclasses.replace(config, d_model=8)
  weights.save_lensnet(
    path, lensnet.init_params(other), other, {})
  with pytest.raises(McjaxError, match="reads vectors of 8"):
    lensnet_policy.load_lensnet(tiny_lm, path, gistnet=tiny_gistnet)


def test_one_without_gists_serves_every_base_of_its_tokenizer(
    tiny_lm, tiny_gistnet, tmp_path):
  config = lensnet.LensNetConfig(d_model=8, key_dim=16, gists=False)
  path, rows = tmp_path / "lens.safetensors", tiny_lm.config.vocab_size
  draw = np.random.default_rng(0)
  params = lensnet.init_params(config, seed=3) | {"table": {
    "vectors": draw.integers(-127, 128, (rows, 16)).astype(np.int8),
    "salience": np.ones((rows, 2), np.float32)}}
  weights.save_lensnet(path, params, config, {"steps": 1})
  policy = lensnet_policy.load_lensnet(tiny_lm, path, gistnet=tiny_gistnet)
  assert policy.reads(tiny_gistnet) and policy.by_meaning
  with MegaContext.create("memory://plain/", tiny_lm, Config(window=512),
                          tiny_gistnet, policy) as mc:
    mc.ingest(tiny_base.text(3000))
    mc.generate("What is it?", max_new_tokens=2)
    assert mc.policy == "lensnet"
  params["table"] = {k: v[:-1] for k, v in params["table"].items()}
  weights.save_lensnet(path, params, config, {})
  with pytest.raises(McjaxError, match="table of keys has .* tokens"):
    lensnet_policy.load_lensnet(tiny_lm, path, gistnet=tiny_gistnet)


def test_a_window_of_gists_only_is_scored(tiny_lm, tiny_gistnet):
  mc = opened(tiny_lm, tiny_gistnet, 2000, gist_attention="visible")
  scores = mc._loop._policy.score(view_of(mc))
  assert scores.shape == (len(mc.focus()),) and GIST == 1
