"""MegaContext on a tiny base: the loop, pause and resume, cost, bad input."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_base
from tiny_base import further
from tree_reference import FailingWrites

from mcjax import Config, McjaxError, MegaContext
from mcjax.telemetry import compile_count
from mcjax.types import BRANCHING

WINDOW = 512
SMALL = dict(window=WINDOW, recent_tokens=64, gists_per_level=8)


@pytest.fixture
def make(tiny_lm, tiny_gistnet):
  """A MegaContext of the tiny base; keyword arguments go to its Config."""
  opened = []

  def create(url=None, lm=tiny_lm, gistnet=tiny_gistnet, **config):
    mc = MegaContext.create(
      url or tiny_base.memory_url(), lm, Config(**{**SMALL, **config}),
      gistnet=gistnet,
    )
    opened.append(mc)
    return mc

  yield create
  for mc in opened:
    mc.close()


def state_of(mc):
  """What a call that is not remembered must leave as it was."""
  tree = mc.tree
  levels = range(1, tree.top_level + 1)
  return dict(
    cursor=mc.cursor, committed=tree.committed, extra=tree.extra,
    focus=mc.focus(), tokens=tree.tokens(0, mc.cursor).tolist(),
    gists=[tree.gists(l, 0, tree.num_nodes(l)).tobytes() for l in levels],
    access=[
      tree.access_counts(l, 0, tree.num_nodes(l)).tolist() for l in levels
    ],
    step=mc._loop.step,
  )


def settled_logits(mc):
  """Logits that another `next_logits` repeats bit by bit.

  Each call runs the newest token again, now in a chunk of its own.
  """
  mc.next_logits()
  return mc.next_logits()


def window_logits(mc):
  return tiny_base.window_logits(mc._loop.context, mc.tree)


# --- Ingest and generate -----------------------------------------------------


def test_ingest_and_generate_join_the_history(make, tiny_lm):
  mc = make(check_invariants=True)
  stats = mc.ingest(tiny_base.text(2000, 1))
  assert stats.tokens == stats.cursor == mc.cursor == 2001
  assert stats.seconds > 0 and stats.tokens_per_second > 0
  said = []
  out = mc.generate("and then", max_new_tokens=70, on_text=said.append)
  assert out.prompt_tokens == 8 and len(out.token_ids) == 70
  assert mc.cursor == 2001 + 8 + 70
  encode, history = tiny_lm.tokenizer.encode, mc.tree.tokens(0, mc.cursor)
  np.testing.assert_array_equal(history, np.concatenate([
    [tiny_base.BOS], encode(tiny_base.text(2000, 1)), encode("and then"),
    out.token_ids,
  ]))
  assert out.text == tiny_lm.tokenizer.decode(out.token_ids) == said[-1]
  assert len(said) > 1 and out.text.startswith(said[0])
  assert 0 < out.first_token_seconds <= out.seconds
  assert mc.telemetry.counters["decoded_tokens"] == 70


def test_generation_is_greedy_over_the_whole_short_history(make, tiny_lm):
  """While all fits the window, the loop is plain decoding."""
  mc = make()
  mc.ingest(tiny_base.text(100, 1))
  out = mc.generate("what?", max_new_tokens=45)
  ids = mc.tree.tokens(0, mc.cursor).tolist()
  table = np.asarray(tiny_lm.params["embed"])
  for at in range(mc.cursor - 45, mc.cursor):
    logits = tiny_base.plain_logits(tiny_lm, table[ids[:at]], np.arange(at))
    assert int(np.argmax(logits[-1])) == ids[at]
  assert len(set(out.token_ids.tolist())) > 3


class NothingMatters:
  """A policy that gives everything up."""

  touched = bytes_read = 0
  sources = ()

  def score(self, view):
    return np.full(len(view.entries), -0.9, np.float32)

  def warm_up(self, context):
    del context


def test_a_question_protects_itself_and_not_the_text_before(make):
  mc = make(protect_tokens=128, recent_tokens=128, check_invariants=True)
  mc.ingest(tiny_base.text(1000 + 23, 1))  # with <bos> 32 blocks
  mc._loop._policy = NothingMatters()
  for _ in range(8):
    mc._loop.refocus(need=0)
  assert sum(e.level == 0 for e in mc.focus()) == 32 + 128  # sink and newest
  out = mc.generate("x" * 40, max_new_tokens=1, remember=False)
  raw = [e.start for e in out.focus if e.level == 0]
  assert raw == [*range(32), *range(1024, 1064)]
  out = mc.generate("x" * 400, max_new_tokens=1, remember=False)
  raw = [e.start for e in out.focus if e.level == 0]
  assert raw == [*range(32), *range(1280, 1424)]  # 128 newest, whole blocks


def test_an_empty_history_answers_too(make):
  mc = make()
  assert mc.focus() == []
  out = mc.generate("hello", max_new_tokens=5)
  assert mc.cursor == 1 + 5 + 5 and len(out.token_ids) == 5
  assert mc.tree.tokens(0, 1)[0] == tiny_base.BOS


@pytest.mark.parametrize(
  "count", [480, 512, 1300, *further(479, 511, 600, 5000)])
def test_a_prompt_longer_than_the_window_is_ingested(make, count):
  mc = make(check_invariants=True)
  mc.ingest(tiny_base.text(200, 1))
  out = mc.generate(tiny_base.text(count, 2), max_new_tokens=40)
  assert len(out.token_ids) == 40
  assert mc.cursor == 201 + count + 40
  assert mc.focus()[-1].stop == mc.cursor
  assert len(mc.focus()) <= WINDOW


def test_a_turn_follows_the_chat_template(make, tiny_lm):
  chat = dataclasses.replace(
    tiny_lm, tokenizer=tiny_base.byte_tokenizer(chat=True)
  )
  mc = make(lm=chat)
  out = mc.generate("hi", max_new_tokens=3)
  text = chat.tokenizer.decode(
    mc.tree.tokens(0, mc.cursor), keep_special=True
  )
  assert text == (
    f"<|turn|>user: hi<|stop|><|turn|>assistant: {out.text}<|stop|>"
  )
  mc.generate("so", max_new_tokens=2)
  text = chat.tokenizer.decode(mc.tree.tokens(0, mc.cursor), keep_special=True)
  assert text.count("<|turn|>user: so<|stop|><|turn|>assistant: ") == 1
  plain = make(lm=chat, chat="plain")
  plain.generate("hi", max_new_tokens=3)
  assert plain.cursor == 5


@pytest.mark.parametrize("text, between", [("abc", "\n"), ("abc\n", "")])
def test_a_turn_begins_on_a_new_line(make, tiny_lm, text, between):
  chat = dataclasses.replace(
    tiny_lm, tokenizer=tiny_base.byte_tokenizer(chat=True))
  mc = make(lm=chat)
  mc.ingest(text)
  mc.generate("hi", max_new_tokens=2)
  said = chat.tokenizer.decode(mc.tree.tokens(0, mc.cursor), keep_special=True)
  assert said.startswith(f"{text}{between}<|turn|>user: hi<|stop|>")


def test_a_stop_token_ends_the_answer_and_is_not_repeated(make, tiny_lm):
  """Makes the stop token the likeliest by its column of the unembedding."""
  chat = tiny_base.byte_tokenizer(chat=True)
  params = dict(tiny_lm.params)
  params["final_norm"] = params["final_norm"] * np.float32(0)
  params["unembed"] = params["unembed"]
  lm = dataclasses.replace(tiny_lm, params=params, tokenizer=chat)
  mc = make(lm=lm)  # equal logits: token 0 is said, and no stop
  assert len(mc.generate("hi", max_new_tokens=5).token_ids) == 5
  stops = tiny_base.byte_tokenizer(chat=True)
  stops.stop_ids = (0,)
  mc = make(lm=dataclasses.replace(lm, tokenizer=stops))
  out = mc.generate("hi", max_new_tokens=5)
  assert out.token_ids.tolist() == [0] and out.text == ""


def test_sampling_depends_on_the_seed_alone(make):
  def said(**config):
    mc = make(temperature=1.0, **config)
    mc.ingest(tiny_base.text(100))
    return mc.generate("go on", max_new_tokens=40).token_ids.tolist()

  assert said(seed=1) == said(seed=1) != said(seed=2)


def test_an_answer_need_not_be_remembered(make):
  mc = make(policy="random", gist_attention="visible")
  mc.ingest(tiny_base.text(2000))
  logits, before = settled_logits(mc), state_of(mc)
  out = mc.generate(tiny_base.text(300, 3), max_new_tokens=70, remember=False)
  assert len(out.token_ids) == 70
  assert state_of(mc) == before
  np.testing.assert_array_equal(mc.next_logits(), logits)


# --- The cache: exact, spliced, refreshed ------------------------------------


def exercise(mc):
  """Ingests and answers, with logits in between, so that caches fill."""
  for seed, count in enumerate((300, 250, 40, 900, 10)):
    mc.ingest(tiny_base.text(count, seed))
    yield "ingest"
    mc.generate(tiny_base.text(20 + seed, 50 + seed), max_new_tokens=70)
    yield "generate"


@pytest.mark.parametrize("policy, visible", [
  ("random", "visible"),
  *further(("similarity", "masked"), ("random", "masked"),
           ("similarity", "visible"), ("recency", "visible"),
           ("recency", "masked")),
])
def test_exact_mode_is_a_plain_forward_of_the_window(make, policy, visible):
  mc = make(kv="exact", policy=policy, gist_attention=visible, gist_stride=3)
  for what in exercise(mc):
    np.testing.assert_allclose(
      mc.next_logits(), window_logits(mc), atol=1e-4, err_msg=what
    )
  assert mc.telemetry.counters["edits"] > 0


def test_splicing_is_exact_while_nothing_is_edited(make):
  mc = make(kv="splice", policy="recency")
  mc.ingest(tiny_base.text(100))
  for seed in range(3):
    mc.generate(tiny_base.text(9, seed), max_new_tokens=70)
    np.testing.assert_allclose(mc.next_logits(), window_logits(mc), atol=1e-4)
  assert mc.telemetry.counters["edits"] == 0


def test_splicing_is_not_exact_after_edits_but_refreshing_is(make):
  spliced = make(policy="random", gist_attention="visible")
  fresh = make(policy="random", gist_attention="visible", refresh_every=1)
  error = []
  for mc in (spliced, fresh):
    for _ in exercise(mc):
      pass
    mc.generate("x", max_new_tokens=65)
    error.append(np.abs(mc.next_logits() - window_logits(mc)).max())
  assert error[0] > 1e-3 > 1e-4 > error[1]


def test_a_refresh_without_edits_changes_nothing(make):
  said = []
  for every in (0, 1, 3):
    mc = make(policy="recency", refresh_every=every)
    mc.ingest(tiny_base.text(100))
    said.append(mc.generate("and", max_new_tokens=200).token_ids.tolist())
    assert mc.telemetry.counters["edits"] == 0
  assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("visible", ["visible", *further("masked")])
def test_a_refocus_runs_the_lm_on_what_changed_only(make, visible):
  mc = make(policy="random", gist_attention=visible, settle_steps=0)
  mc.ingest(tiny_base.text(3000))
  mc.next_logits()
  before = dict(mc.telemetry.counters)
  mc.generate("go", max_new_tokens=1500)
  spent = {k: n - before.get(k, 0) for k, n in mc.telemetry.counters.items()}
  refocused = [
    r for r in mc.telemetry.records if r["kind"] == "refocus" and r["edits"]
  ]
  gists = spent["collapses"] if visible == "visible" else 0
  # Expands of L2 swap in 32 gists, which are not run where they are masked.
  opened = sum(
    action > 0 and (level == 1 or visible == "visible")
    for r in refocused for action, level, _ in r["edits"]
  )
  assert spent["expands"] > 5 and spent["collapses"] > 5
  assert spent["splice_tokens"] == (
    BRANCHING * opened + gists + len(refocused)
  )
  assert spent["splice_tokens"] < 0.2 * len(refocused) * WINDOW


# --- Nothing compiles --------------------------------------------------------


def test_the_compile_counter_counts():
  before = compile_count()
  jax.jit(lambda x: x * np.float32(3.5) + x)(np.zeros(3, np.float32))
  assert compile_count() > before


@pytest.mark.parametrize("policy, steps", [
  ("random", 20),
  *further(("random", 450), ("similarity", 300), ("recency", 300),
           ("lensnet", 60)),
])
def test_nothing_compiles_after_warming_up(make, policy, steps):
  """With the slow ones more than 1,000 refocus and 30,000 decode steps."""
  mc = make(
    policy=policy, gist_attention="visible", delta_nll_every=50,
    threshold=0.05 if policy == "random" else 0.2,
  )
  mc.ingest(tiny_base.text(3000))
  mc.generate("warm", max_new_tokens=70)
  mc.score(tiny_base.text(70, 1))
  before = compile_count()
  count = mc.telemetry.counters
  for seed in range(6):
    mc.ingest(tiny_base.text(1 + 211 * seed, seed))
    mc.generate(tiny_base.text(1 + 37 * seed, seed), max_new_tokens=33)
    mc.score(tiny_base.text(1 + 50 * seed, seed))
    mc.next_logits()
  start, decoded = count["refocus_steps"], count["decoded_tokens"]
  while count["refocus_steps"] - start < steps:
    mc.generate("more", max_new_tokens=100 * BRANCHING)
  assert compile_count() == before
  assert count["decoded_tokens"] - decoded > 0.8 * steps * BRANCHING
  if policy == "random":
    least = 300 if steps == 450 else 12
    assert count["expands"] > least and count["collapses"] > least


# --- Pause and resume --------------------------------------------------------

RESUME = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np, tiny_base, mcjax
lm = tiny_base.make_lm()
gistnet = tiny_base.gistnet(lm, spread=0.05)
out = {{}}
for url in {urls!r}:
  mc = mcjax.MegaContext.open(url, lm, gistnet=gistnet)
  out[url] = dict(
    focus=mc.focus(), step=mc._loop.step, cursor=mc.cursor,
    policy=mc.config.policy, logits=mc.next_logits().tolist(),
    said=mc.generate("on", 40, remember=False).token_ids.tolist(),
  )
  mc.close()
json.dump(out, open({result!r}, "w"))
"""


def in_a_new_process(urls, folder):
  here = pathlib.Path(__file__).parent
  result = str(folder / "result.json")
  code = RESUME.format(
    root=str(here.parent), tests=str(here), urls=urls, result=result
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr
  return json.loads(pathlib.Path(result).read_text())


def test_a_new_process_resumes_focus_and_logits(make, tmp_path):
  """A tree keeps no cache: resuming rebuilds it, as exact mode would.

  So logits are the same where nothing was spliced (ingested, decoded), and
  those of an exact rebuild of the same window where something was.
  """
  expected = {}
  for name, config in (
    ("ingested", {}),
    ("decoded", dict(policy="recency")),
    ("edited", dict(policy="random", gist_attention="visible")),
  ):
    mc = make(str(tmp_path / name), **config)
    mc.ingest(tiny_base.text(100 if name == "decoded" else 2500))
    if name != "ingested":
      mc.generate("tell me", max_new_tokens=100)
    edits = mc.telemetry.counters["edits"]
    assert (edits > 0) == (name == "edited")
    spliced = mc.next_logits()
    mc._loop.context.forget()
    logits = mc.next_logits()
    if not edits:
      np.testing.assert_allclose(logits, spliced, atol=1e-4)
    said = mc.generate("on", 40, remember=False).token_ids.tolist()
    url = str(tmp_path / name)
    expected[url] = dict(
      focus=[list(f) for f in mc.focus()], step=mc._loop.step,
      cursor=mc.cursor, policy=mc.config.policy, logits=logits,
    )
    if name != "edited":  # the random policy starts anew
      expected[url]["said"] = said
    mc.close()
  got = in_a_new_process(list(expected), tmp_path)
  for url, values in expected.items():
    logits = values.pop("logits")
    np.testing.assert_allclose(got[url]["logits"], logits, atol=1e-4)
    assert {k: got[url][k] for k in values} == values


def test_open_can_change_the_configuration(make, tiny_lm, tiny_gistnet):
  mc = make()
  mc.ingest(tiny_base.text(3000))
  url = mc.tree.url
  mc.close()
  for config, same in ((Config(**{**SMALL, "policy": "recency"}), True),
                       (Config(window=1024), True)):
    other = MegaContext.open(url, tiny_lm, config, gistnet=tiny_gistnet)
    assert other.config == config
    assert (other.focus() == mc.focus()) == same
    other.close()
  again = MegaContext.open(url, tiny_lm, gistnet=tiny_gistnet)
  assert again.config == Config(window=1024)
  again.close()


def test_a_crash_resumes_at_the_last_commit(make, tiny_lm, tiny_gistnet):
  mc = make()
  mc.ingest(tiny_base.text(700))
  focus = mc.focus()
  mc._loop.remember(np.arange(50, dtype=np.int32))  # and no commit
  again = MegaContext.open(mc.tree.url, tiny_lm, gistnet=tiny_gistnet)
  assert again.cursor == 701 and again.focus() == focus
  again.close()
  mc.tree.close()
  mc._closed = True


# --- Cost --------------------------------------------------------------------


@pytest.mark.parametrize("longest", [50_000, *further(300_000)])
def test_the_cost_of_a_step_does_not_grow_with_the_history(make, longest):
  """Counted work of one turn at 10,000 tokens of history and at many more."""
  costs = []
  for history in (10_000, longest):
    mc = make(gist_attention="visible", search_nodes=256, settle_steps=8)
    ids = tiny_base.text(10_000, 1)
    mc.ingest((ids * (history // 10_000))[:-1])
    assert mc.cursor == history
    mc.generate("warm the loop up", max_new_tokens=32)
    tree, count = mc.tree, mc.telemetry.counters
    before, rows = dict(count), tree.reads
    mc.generate(tiny_base.text(40, 77), max_new_tokens=320)
    cost = {k: n - before.get(k, 0) for k, n in count.items()}
    cost |= {f"rows of {k}": n - rows[k] for k, n in tree.reads.items()}
    cost["entries"] = len(mc.focus())
    costs.append(cost)
  small, large = costs
  print(small, large)
  assert small["decoded_tokens"] == large["decoded_tokens"] == 320
  assert small["refocus_steps"] >= 9
  for name in ("lm_tokens", "rows of tokens", "rows of gists", "rows of keys",
               "rows of ingest", "gist_blocks", "refocus_steps", "entries"):
    # Not equal: other edits are made, and L3 exists in the long history only.
    assert large[name] <= 1.5 * small[name] + 300, (name, small, large)
  steps = large["refocus_steps"]
  assert large["nodes_touched"] <= 256 * steps
  assert sum(large[f"rows of {k}"] for k in tree.reads) < 3000 * steps


# --- Score -------------------------------------------------------------------


@pytest.mark.parametrize("start, count", [
  (0, 33), (1, 1), (31, 32), (100, 200),
  *further(*itertools.product((0, 1, 31, 100), (1, 31, 32, 33, 200))),
])
def test_a_score_is_the_plain_nll_while_all_fits(
  make, tiny_lm, start, count
):
  mc = make()
  if start:
    mc.ingest(tiny_base.text(start))
  text = tiny_base.text(count, 9)
  nll = mc.score(text)
  history = mc.tree.tokens(0, mc.cursor)
  ids = np.concatenate([history, tiny_lm.tokenizer.encode(text)])
  expected = tiny_base.plain_nll(tiny_lm, ids)[mc.cursor :]
  assert np.isnan(nll[0]) == (start == 0)
  np.testing.assert_allclose(nll, expected, atol=1e-4)
  # Another alignment of targets is far off.
  if count > 30:
    assert np.nanmean(np.abs(nll[1:] - expected[:-1])) > 0.3


@pytest.mark.parametrize("policy", [
  "random", "lensnet", *further("similarity", "recency", "oracle"),
])
def test_a_score_is_not_remembered(make, policy):
  mc = make(policy=policy, gist_attention="visible", check_invariants=True)
  mc.ingest(tiny_base.text(2000))
  logits, before = settled_logits(mc), state_of(mc)
  first = mc.score(tiny_base.text(700, 4))
  assert first.shape == (700,) and np.isfinite(first).all()
  assert state_of(mc) == before
  np.testing.assert_array_equal(mc.next_logits(), logits)
  if policy != "random":
    np.testing.assert_array_equal(mc.score(tiny_base.text(700, 4)), first)


def test_scores_of_a_uniform_base_are_ln_v(make, tiny_lm):
  mc = make(lm=tiny_base.uniform(tiny_lm), policy="random",
            gist_attention="visible")
  mc.ingest(tiny_base.text(1500))
  nll = mc.score(tiny_base.text(300, 5))
  np.testing.assert_allclose(nll, np.log(tiny_base.VOCAB), rtol=1e-6)


def test_a_score_is_as_good_in_any_number_of_pieces(make):
  """Teacher forcing runs every token once, whatever the block edges."""
  whole, parts = make(), make()
  text = tiny_base.text(150, 3)
  for mc in (whole, parts):
    mc.ingest(tiny_base.text(90, 8))
  nll = whole.score(text)
  for a, b in ((0, 40), (40, 45), (45, 150)):
    np.testing.assert_allclose(parts.score(text[a:b]), nll[a:b], atol=1e-4)
    parts.ingest(text[a:b])


# --- Bad input ---------------------------------------------------------------


@pytest.fixture
def used(make):
  mc = make(policy="similarity", gist_attention="visible")
  mc.ingest(tiny_base.text(1500))
  mc.generate("first", max_new_tokens=20)
  return mc


@pytest.mark.parametrize("call, message", [
  (lambda mc: mc.ingest(""), "text is empty"),
  (lambda mc: mc.ingest(b"bytes"), "text must be a string, got bytes"),
  (lambda mc: mc.ingest(None), "text must be a string, got NoneType"),
  (lambda mc: mc.ingest("\ud800"), "not valid Unicode"),
  (lambda mc: mc.score(""), "text is empty"),
  (lambda mc: mc.score(["a"]), "text must be a string, got list"),
  (lambda mc: mc.score("\ud800"), "not valid Unicode"),
  (lambda mc: mc.generate(""), "prompt is empty"),
  (lambda mc: mc.generate(7), "prompt must be a string, got int"),
  (lambda mc: mc.generate("\ud800"), "not valid Unicode"),
  (lambda mc: mc.generate("a", 0), "max_new_tokens .* got 0"),
  (lambda mc: mc.generate("a", -3), "max_new_tokens .* got -3"),
  (lambda mc: mc.generate("a", 2.5), "max_new_tokens .* got 2.5"),
  (lambda mc: mc.generate("a", "5"), "max_new_tokens .* got 5"),
  (lambda mc: mc.ingest_tokens(np.zeros(0, np.int32)), "no tokens"),
  (lambda mc: mc.ingest_tokens(np.array([5, 300])), "vocabulary of 300"),
  (lambda mc: mc.ingest_tokens(np.array([-1])), "vocabulary of 300"),
])
def test_bad_input_is_one_line_and_changes_nothing(used, call, message):
  logits, before = settled_logits(used), state_of(used)
  with pytest.raises(McjaxError, match=message) as caught:
    call(used)
  assert "\n" not in str(caught.value)
  assert state_of(used) == before
  np.testing.assert_array_equal(used.next_logits(), logits)
  assert len(used.generate("still there?", max_new_tokens=40).token_ids) == 40


def test_a_failing_gistnet_leaves_everything_usable(used, monkeypatch):
  before = state_of(used)
  with monkeypatch.context() as patch:
    patch.setattr(
      used.tree._encoder, "encode_tokens",
      lambda ids: np.full((len(ids), 32), np.nan, np.float32),
    )
    for call in (used.ingest, used.score):
      with pytest.raises(McjaxError, match="not finite"):
        call(tiny_base.text(100, 6))
      assert state_of(used) == before
  used.ingest(tiny_base.text(100, 6))
  assert used.cursor == before["cursor"] + 100
  assert len(used.generate("so?", max_new_tokens=40).token_ids) == 40


def test_the_oracle_does_not_generate(make):
  mc = make(policy="oracle")
  mc.ingest(tiny_base.text(1500))
  before = state_of(mc)
  with pytest.raises(McjaxError, match="oracle .* in score only"):
    mc.generate("hello")
  assert state_of(mc) == before
  assert np.isfinite(mc.score(tiny_base.text(80, 2))).all()


def test_an_empty_history_predicts_nothing(make):
  mc = make()
  with pytest.raises(McjaxError, match="history is empty"):
    mc.next_logits()


def test_a_closed_context_says_so(make):
  mc = make()
  mc.ingest(tiny_base.text(300))
  mc.next_logits()
  mc.close()
  mc.close()
  for call in (
    lambda: mc.ingest("a"), lambda: mc.generate("a"), lambda: mc.score("a"),
    mc.next_logits,
  ):
    with pytest.raises(McjaxError, match="closed"):
      call()


def test_the_wrong_base_or_gistnet_is_refused(make, tmp_path, tiny_lm):
  url = str(tmp_path / "t")
  mc = make(url)
  mc.ingest(tiny_base.text(100))
  mc.close()
  other = tiny_base.make_lm(seed=1, name="other")
  with pytest.raises(McjaxError, match="tiny .*other "):
    MegaContext.open(url, other, gistnet=tiny_base.gistnet(other))
  with pytest.raises(McjaxError, match="GistNet"):
    MegaContext.open(url, tiny_lm, gistnet=tiny_base.gistnet(tiny_lm))
  again = MegaContext.open(url, tiny_lm, gistnet=mc._loop._encoder)
  assert again.cursor == 101
  again.close()


def test_places_that_cannot_be_used(make, tmp_path, tiny_lm, tiny_gistnet):
  (tmp_path / "file").write_text("x")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "letter").write_text("dear")
  for place in (tmp_path / "file" / "t", tmp_path / "full", "ftp://a/b",
                "/proc/mcjax/t"):
    with pytest.raises(McjaxError) as caught:
      make(str(place))
    assert "\n" not in str(caught.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
  assert [p.name for p in (tmp_path / "full").iterdir()] == ["letter"]
  with pytest.raises(McjaxError, match="no tree"):
    MegaContext.open(str(tmp_path / "none"), tiny_lm, gistnet=tiny_gistnet)
  assert not (tmp_path / "none").exists()


def test_a_second_create_leaves_the_first_alone(make, tmp_path):
  mc = make(str(tmp_path / "t"))
  mc.ingest(tiny_base.text(100))
  with pytest.raises(McjaxError, match="already holds a tree"):
    make(str(tmp_path / "t"))
  mc.ingest(tiny_base.text(100, 1))
  assert mc.cursor == 201


def test_a_window_beyond_the_base_is_refused_before_anything_is_made(
  make, tmp_path
):
  with pytest.raises(McjaxError, match=r"config\.window 2048 .*2048 positions"):
    make(str(tmp_path / "t"), window=2048)
  assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_create_on_a_full_disk_leaves_nothing(
  make, tmp_path, monkeypatch, allowed
):
  """Whichever write of the record fails; creating again then works."""
  with monkeypatch.context() as patch:
    writes = FailingWrites(patch, allowed)
    try:
      make(str(tmp_path / "t"))
      assert writes.left >= 0, "a failed write was passed over"
    except McjaxError as error:
      assert "No space left" in str(error)
      assert list(tmp_path.iterdir()) == []
      patch.undo()
      make(str(tmp_path / "t")).ingest("works now")


def test_a_telemetry_file_that_cannot_be_written(make, tmp_path):
  with pytest.raises(McjaxError, match=r"config\.telemetry_path"):
    make(str(tmp_path / "t"), telemetry_path=str(tmp_path / "no" / "t.jsonl"))
  assert not (tmp_path / "t").exists()


def test_a_with_block_closes(make):
  with make() as mc:
    mc.ingest("abc")
  with pytest.raises(McjaxError, match="closed"):
    mc.ingest("abc")
