"""Planted needs and the parts of the focus suite."""

import itertools
import json
import re

import numpy as np
import pytest
from untimed import untimed

from mcjax.evaluation.data import planted, reworded
from mcjax.evaluation.suites import (
  focus,
  focus_bench,
  focus_labels,
  focus_planted,
  focus_shift,
)
from mcjax.evaluation.systems import baselines
from mcjax.evaluation.systems.known_places import KnownPlaces
from mcjax.testing import tiny_base
from mcjax.training.common.data import TokenStore
from mcjax.training.common.ranks import ranks, spearman
from mcjax.training.lens import other_words
from mcjax.types import Entry, McjaxError
from mcjax.window.counterfactual import Candidate, edit_losses
from mcjax.window.working_context import COLLAPSE, EXPAND


def store(documents):
  """A token store in memory."""
  sizes = [0, *(len(d) for d in documents)]
  return TokenStore(
    np.concatenate(documents), np.cumsum(sizes),
    tuple(str(i) for i in range(len(documents))),
  )


def words(tokenizer, count, seed):
  """Token ids [count] of made-up words, other ones for every seed."""
  rng = np.random.default_rng(seed)
  pool = [f"{a}{b}{c}" for a in "bcdfgklm" for b in ("ad", "il", "um", "er")
          for c in "aeiouy"]
  own = rng.choice(pool, 24, replace=False)
  return tokenizer.encode(" ".join(rng.choice(own, count)))[:count]


@pytest.fixture(scope="module")
def stores(tiny_lm):
  return {kind: store([words(tiny_lm.tokenizer, 4000, 10 * k + i)
                       for i in range(3)])
          for k, kind in enumerate(("code", "prose"))}


def settings_of(**changes):
  small = dict(window=512, documents=1, histories=1, answers=False)
  return focus.Settings(**{**small, **changes})


def values_of(report):
  return {k: v.value for k, v in report.figures.items()}


_COMMON = set("does were from with their that what which have has".split())

# --- planted ----------------------------------------------------------------


def test_facts_are_where_plant_says():
  text = np.arange(1000, 2000, dtype=np.int32)
  facts = [np.arange(5 * i, 5 * i + 5, dtype=np.int32) for i in range(7)]
  ids, places = planted.plant(text, facts, seed=3)
  assert len(ids) == 1035
  for fact, (start, stop) in zip(facts, places):
    np.testing.assert_array_equal(ids[start:stop], fact)
  np.testing.assert_array_equal(ids[ids >= 1000], text)


def test_needs_are_reproducible_and_differ():
  needs = planted.draw(40, seed=1)
  assert needs == planted.draw(40, seed=1)
  assert len({n.question for n in needs}) == 40
  assert not set(needs) & set(planted.draw(40, seed=2))
  for need in needs:
    assert need.answer in need.fact and need.answer not in need.question


@pytest.mark.parametrize("split", ["test", "validation"])
def test_reworded_questions_share_no_telling_word_with_their_facts(split):
  needs = reworded.draw(20, 0, 3, split) + reworded.draw(20, 1, 3, split)
  assert needs[:20] == reworded.draw(20, 0, 3, split)
  assert len({n.fact for n in needs}) == 40
  taught = {text for some in ("train", "validation")
            for pair in other_words.facts(some) for text in pair}
  assert not {text for n in needs for text in (n.fact, n.question)} & taught
  often = "that what chat currently crowd several sixty prose would water"
  if split == "validation":
    assert not {n.fact for n in needs} & {n.fact for n in reworded.draw(
      40, 0, 3, "test")}
    assert not [n for n in needs if n.answer in often], "answered by chance"
  for need in needs:
    fact, question = (
      set(re.findall(r"[a-z]{4,}", t.lower()))
      for t in (need.fact, need.question))
    assert not (fact & question) - _COMMON, need
    assert need.answer.lower() in need.fact.lower()
    assert need.answer.lower() not in need.question.lower()
  with pytest.raises(McjaxError, match="there are 40 reworded facts"):
    reworded.draw(20, 2, 3, split)


def test_covered_needs_every_token_at_l0():
  tiling = [Entry(0, i, i + 1) for i in range(32)] + [Entry(1, 32, 64)]
  assert focus_planted.covered((3, 32), tiling)
  assert not focus_planted.covered((30, 33), tiling)
  assert not focus_planted.covered((40, 45), tiling)


def test_history_is_text_of_every_kind_and_repeats_in_another_order():
  documents = [np.arange(50 * i, 50 * i + 50, dtype=np.int32)
               for i in range(8)]
  stores = {"code": store(documents[:4]), "prose": store(documents[4:])}
  ids = focus_bench.history_of(stores, 1200, 0, seed=0)
  assert len(ids) == 1200
  once, again, third = ids.reshape(3, 400)
  assert set(once) == set(again) == set(third) == set(range(400))
  assert not np.array_equal(once, again)
  with pytest.raises(McjaxError, match="no text"):
    focus_bench.history_of({"code": store([np.zeros(0, np.int32)])}, 9, 0, 0)


@pytest.fixture(scope="module")
def planted_run(tiny_lm, tmp_path_factory):
  """Settings, folder and report of a planted run at two lengths."""
  folder = tmp_path_factory.mktemp("planted")
  stores = {"prose": store([words(tiny_lm.tokenizer, 3000, i)
                            for i in range(4)])}
  settings = settings_of(
    parts=("planted",), history=6_000, needs=4, long_history=12_000,
    long_needs=2, policies=("similarity", "recency", "oracle"),
  )

  def retriever(texts, questions):  # counts shared words
    sets = [set(t.split()) for t in texts]
    return np.array([[len(set(q.split()) & s) for s in sets]
                     for q in questions], float)

  def run(changed=settings):
    return focus.measure(tiny_lm, stores, changed, folder, retriever)

  return settings, folder, run(), run


@pytest.mark.slow
def test_the_focus_finds_facts_and_the_search_does_not_grow(planted_run):
  settings, _, report, _ = planted_run
  value = values_of(report)
  for length in (settings.history, settings.long_history):
    name = f"planted/{length}"
    assert value[f"{name}/similarity/hit@budget"] >= 0.7
    assert value[f"{name}/oracle/hit@budget"] == 1.0
    assert value[f"{name}/recency/hit@budget"] == 0.0
    assert value[f"{name}/similarity/bytes read / step"] > 0
    assert 0 < value[f"{name}/similarity/nodes / step"] <= 256
    assert value[f"{name}/budget"] > 0
  nodes = value["planted/12000/similarity/nodes / step"]
  assert value["planted/growth/similarity/nodes / step"] == pytest.approx(
    nodes / value["planted/6000/similarity/nodes / step"]
  )
  assert value["planted/6000/retriever/hit@budget"] > 0.0


@pytest.mark.slow
def test_a_killed_run_goes_on(planted_run, monkeypatch):
  settings, folder, report, run = planted_run

  def fail(*_):
    raise RuntimeError("measured again")

  monkeypatch.setattr(focus_planted, "_ask_all", fail)
  assert values_of(run()) == values_of(report)
  with pytest.raises(RuntimeError, match="measured again"):
    run(settings_of(**{**vars(settings), "needs": 5}))
  report.write(folder)
  found = json.loads((folder / "results.json").read_text())["figures"]
  assert found["planted/6000/oracle/hit@budget"] == {
    "value": 1.0, "unit": "share", "n": 4, "interval": [1.0, 1.0]
  }
  assert found["planted/6000/oracle/hit@budget/minus/similarity"]["n"] == 4


@pytest.mark.parametrize("in_a_row, rounds", [(False, 1), (True, 1), (True, 2)])
def test_questions_in_a_row_join_the_history_in_memory(
  tiny_lm, stores, tmp_path, in_a_row, rounds
):
  settings = settings_of(parts=("planted",), policies=("similarity",),
                         history=2000, needs=2, in_a_row=in_a_row,
                         rounds=rounds)
  bench = focus_bench.Bench(tiny_lm, stores, settings, tmp_path)
  needs = planted.draw(2, seed=0)
  timeline = bench.timeline(stores["prose"].document(0)[:2000])
  story = focus_planted.Story("s", timeline, needs, [(40, 50), (60, 70)])
  seen = []

  class Watching(KnownPlaces):
    def score(self, view):
      if view.asked:
        seen.append(view.query_start)
      return super().score(view)

  out = focus_planted._ask_all(bench, story, Watching())
  assert out["hit"] == [True, True]
  assert min(out["forwarded"]) > 0 and len(out["forwarded"]) == 2
  assert len(set(seen)) == (2 * rounds if in_a_row else 1)
  assert min(seen) == len(timeline)  # the first question follows the text
  assert (max(seen) > len(timeline)) == in_a_row
  with bench.opened(bench.tree(timeline), KnownPlaces()) as mc:
    assert mc.cursor == len(timeline)


@pytest.mark.parametrize("parts, counted", [
  (("planted", "text"), {"planted/1500/in front", "text/random"}),
  pytest.param(("labels", "shift"), {"labels", "shift/random"},
               marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_figures(
    tiny_lm, stores, tmp_path, parts, counted):
  settings = settings_of(
    parts=parts, policies=("similarity", "random"), history=1500, needs=2,
    answers=True, answer_tokens=4,
    document_history=1000, windows=1, spacing=1, candidates=8, horizon=32,
    lead=32, scored=64, shifts=1, shift_history=1000, topic=320)
  once, again = (
    untimed(focus.measure(tiny_lm, stores, settings, tmp_path / name))
    for name in "ab")
  assert once == again
  assert {f"{name}/tokens forwarded" for name in counted} <= once.keys()


def test_an_ingest_goes_on_where_it_was_killed(
  tiny_lm, stores, tmp_path, monkeypatch
):
  monkeypatch.setattr(focus_bench, "_SLICE", 300)
  bench = focus_bench.Bench(tiny_lm, stores, settings_of(), tmp_path)
  timeline = bench.timeline(stores["prose"].document(1)[:1000])
  url = bench.tree(timeline)
  with bench.opened(url, KnownPlaces()) as mc:
    np.testing.assert_array_equal(mc.tree.tokens(0, mc.cursor), timeline)
  assert bench.tree(timeline) == url


def test_unknown_parts_and_policies_are_named(tiny_lm, stores, tmp_path):
  with pytest.raises(McjaxError, match="no part 'plantd'"):
    focus.Settings(parts=("plantd",))
  with pytest.raises(McjaxError, match="policy"):
    focus.measure(tiny_lm, stores,
                  settings_of(parts=("shift",), policies=("guess",)), tmp_path)


# --- labels -----------------------------------------------------------------


def test_ranks_share_ties():
  np.testing.assert_array_equal(ranks([10, 20, 20, 5]), [2, 3.5, 3.5, 1])


def test_spearman_by_hand():
  assert spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
  assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(
    4.5 / np.sqrt(4.5 * 5)
  )
  assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(
    0.8207827, abs=1e-6
  )
  assert spearman([0, 0, 0], [1, 2, 3]) == 0.0
  with pytest.raises(ValueError, match="2 and 1"):
    spearman([1, 2], [1])


def test_wish_of_a_collapse_is_the_negated_mean():
  scores = np.concatenate([[0.5], np.full(16, -0.4), np.full(16, -0.2)])
  assert focus_labels.wish(scores, Candidate(EXPAND, 0)) == 0.5
  assert focus_labels.wish(scores, Candidate(COLLAPSE, 1)) == pytest.approx(0.3)


def _brute_force(candidates, gains, free, need, max_edits):
  """Best sum over every legal set of edits."""
  collapses = sum(c.action == COLLAPSE for c in candidates)
  need = min(need, free + 31 * min(max_edits, collapses))
  best = -np.inf
  for size in range(max_edits + 1):
    for chosen in itertools.combinations(range(len(candidates)), size):
      edits = [candidates[i] for i in chosen]
      groups = [c.entry for c in edits if c.action == COLLAPSE]
      clash = any(g <= c.entry < g + 32 for c in edits
                  if c.action == EXPAND for g in groups)
      if not clash and free - 31 * sum(c.action for c in edits) >= need:
        best = max(best, sum(gains[i] for i in chosen))
  return best


def test_best_gain_is_that_of_every_legal_set():
  rng = np.random.default_rng(0)
  for _ in range(60):
    candidates = [Candidate(EXPAND, int(e))
                  for e in rng.choice(160, 5, replace=False)]
    candidates += [Candidate(COLLAPSE, 32 * int(g))
                   for g in rng.choice(5, rng.integers(0, 5), replace=False)]
    gains = rng.normal(size=len(candidates))
    room = int(rng.integers(0, 120)), 32, int(rng.integers(1, 5))
    assert focus_labels.best_gain(candidates, gains, *room) == pytest.approx(
      _brute_force(candidates, gains, *room)
    )


class _Truth:
  """Scores every edit it is told of by its true gain, times a sign."""

  def __init__(self, sign, horizon):
    self._sign, self._horizon = sign, horizon

  def score(self, view):
    window = view.context_lm.window
    groups = np.flatnonzero(window.sibling_groups())
    level = view.entries.level
    candidates = [Candidate(EXPAND, int(i)) for i in np.flatnonzero(level > 0)]
    candidates += [Candidate(COLLAPSE, int(i)) for i in groups]
    base, losses = edit_losses(
      view.context_lm, view.tree, candidates,
      view.continuation[: self._horizon], pad_to=32,
    )
    scores = np.zeros(len(level))
    for (action, at, *_), gain in zip(candidates, base - losses):
      scores[at : at + (1 if action == EXPAND else 32)] = (
        action * self._sign * gain
      )
    return np.tanh(50 * scores).astype(np.float32)


@pytest.mark.slow
def test_true_gains_rank_perfectly_and_have_least_regret(
  tiny_lm, stores, tmp_path, monkeypatch
):
  settings = settings_of(
    parts=("labels",), policies=("truth", "lie"), document_history=1024,
    windows=2, spacing=2, candidates=12, horizon=32,
  )
  make = focus_bench.Bench.policy
  signs = {"truth": 1, "lie": -1}
  monkeypatch.setattr(
    focus_bench.Bench, "policy", lambda bench, name:
    _Truth(signs[name], 32) if name in signs else make(bench, name),
  )
  monkeypatch.setattr(_Truth, "touched", 0, raising=False)
  monkeypatch.setattr(_Truth, "bytes_read", 0, raising=False)
  monkeypatch.setattr(_Truth, "warm_up", lambda *_: None, raising=False)
  report = focus.measure(tiny_lm, stores, settings, tmp_path)
  value = values_of(report)
  for kind in ("expands", "collapses"):
    assert value[f"labels/truth/rank correlation/of {kind}"] > 0.8
    assert value[f"labels/lie/rank correlation/of {kind}"] < -0.8
  regret = {n: value[f"labels/{n}/regret"] for n in ("truth", "lie", "recency")}
  assert -1e-9 <= regret["truth"] < regret["lie"]
  assert value["labels/recency/regret relative to recency"] == pytest.approx(1)
  assert value["labels/windows"] == 4


# --- text -------------------------------------------------------------------


def test_a_sliding_window_is_the_plain_base_while_it_fits(tiny_lm):
  ids = np.random.default_rng(0).integers(0, 250, 300).astype(np.int32)
  config = focus_bench.Config(window=512)
  nll, _ = baselines.sliding_window_nll(tiny_lm, config, ids, 100)
  np.testing.assert_allclose(
    nll, tiny_base.plain_nll(tiny_lm, ids)[100:], atol=1e-3
  )


def test_a_sliding_window_holds_the_sink_and_the_newest(tiny_lm):
  ids = np.random.default_rng(1).integers(0, 250, 832).astype(np.int32)
  config = focus_bench.Config(window=512)
  nll, forwarded = baselines.sliding_window_nll(tiny_lm, config, ids, 800)
  assert forwarded == 512  # one window, its newest block scored
  seen = np.concatenate([ids[:32], ids[832 - 480 :]])
  np.testing.assert_allclose(
    nll, tiny_base.plain_nll(tiny_lm, seen)[-32:], atol=1e-3
  )


def test_arms_score_the_same_tokens(tiny_lm, stores, tmp_path):
  settings = settings_of(
    parts=("text",), policies=("recency",), document_history=192, lead=32,
    scored=96,
  )
  value = values_of(focus.measure(tiny_lm, stores, settings, tmp_path))
  # All of it fits the window, so both see the same and must agree.
  assert value["text/recency/minus sliding window"] == pytest.approx(
    0, abs=1e-4
  )
  assert value["text/recency/nll"] > 1.0
  counts = [value[f"text/{arm}/tokens forwarded"]
            for arm in ("recency", "sliding window")]
  # All is read once, and of every further block a token before it anew.
  assert counts[0] >= counts[1] >= 192 + 32 + 96


@pytest.mark.slow
def test_the_same_budget_on_longer_text(tiny_lm, stores, tmp_path):
  settings = settings_of(
    parts=("text",), policies=("recency", "random"), document_history=2048,
    lead=256, scored=64,
  )
  value = values_of(focus.measure(tiny_lm, stores, settings, tmp_path))
  assert value["text/random/minus sliding window"] == pytest.approx(
    value["text/random/nll"] - value["text/sliding window/nll"]
  )
  assert 0.5 < value["text/recency/window in use"] <= 1.0


# --- shift ------------------------------------------------------------------


def test_a_passage_is_laid_out_as_it_says():
  filler, a, b = (np.full(n, v) for n, v in ((96, 0), (96, 1), (96, 2)))
  passage = focus_shift.Passage(filler, a, b, topic=64)
  ids = passage.timeline
  for spans, value in ((passage.first, 1), (passage.second, 2)):
    inside = np.concatenate([np.arange(*s) for s in spans])
    np.testing.assert_array_equal(np.flatnonzero(ids == value),
                                  np.sort(inside))
  assert (passage.start, passage.shift, passage.back) == (160, 224, 256)


def test_summary_by_hand():
  def step(first, second, old_first, old_second, edits):
    return {"raw": 100, "first": first, "second": second,
            "old first": old_first, "old second": old_second, "edits": edits}
  steps = [step(80, 0, 90, 0, 2)] * 4 + [step(60, 10, 70, 8, 4)] * 3
  steps += [step(20, 70, 30, 64, 4)] * 5 + [step(50, 30, 62, 0, 1)] * 4
  found = focus_shift.summary({"steps": steps, "shift": 4, "back": 12})
  assert found == {
    "before the shift": 0.8, "of the new topic before the shift": 0.0,
    "4 steps after the shift": 0.7, "just before the return": 0.2,
    "4 steps after the return": 0.5, "of A collapsed after the shift": 60.0,
    "of B brought back after the shift": 64.0,
    "of A brought back after the return": 32.0,
    "edits per refocus in steady text": 2.0,
  }


@pytest.mark.slow
def test_known_topics_are_followed_and_recency_never_looks_back(
  tiny_lm, stores, tmp_path
):
  settings = settings_of(
    parts=("shift",), policies=("oracle", "recency"), shifts=2,
    shift_history=3072, topic=768,
  )
  value = values_of(focus.measure(tiny_lm, stores, settings, tmp_path))
  assert value["shift/oracle/of B brought back after the shift"] >= 64
  assert value["shift/oracle/4 steps after the shift"] > value[
    "shift/recency/4 steps after the shift"]
  for what in ("of B brought back after the shift",
               "of A brought back after the return"):
    assert value[f"shift/recency/{what}"] <= 0
  assert (tmp_path / "shift-0-oracle.json").exists()


def test_histories_hold_the_keys_of_the_lensnet_that_is_measured(
  tiny_lm, stores, tmp_path
):
  settings = settings_of(parts=(), policies=("lensnet",))
  bench = focus_bench.Bench(tiny_lm, stores, settings, tmp_path)
  url = bench.tree(bench.timeline(stores["code"].document(0)[:511]))
  policy = bench.policy("lensnet")
  with bench.opened(url, policy) as mc:
    assert mc.tree.lens_fingerprint == policy.keyer.fingerprint
  report = focus.measure(tiny_lm, stores, settings, tmp_path)
  assert report.notes == ["lensnet is untrained."]


@pytest.mark.slow
def test_known_places_want_whole_blocks(tiny_lm, stores, tmp_path):
  bench = focus_bench.Bench(tiny_lm, stores, settings_of(), tmp_path)
  url = bench.tree(bench.timeline(stores["code"].document(0)[:2047]))
  policy = KnownPlaces([(1000, 1030)])
  with bench.opened(url, policy) as mc:
    mc._loop.cold_start(256)
    mc._loop.settle()
    raw = {e.start for e in mc.focus() if e.level == 0}
  assert set(range(992, 1056)) <= raw
