"""MegaContext on a tiny base: the loop, pause and resume, cost, score."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
from marks import further
import numpy as np
import pytest
from runtime_cases import SMALL, WINDOW, settled_logits, state_of

from mcjax import Config, MegaContext
from mcjax.runtime.telemetry import compile_count
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING, McjaxError

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


@pytest.mark.parametrize("tokens", [1_000, 3_000, 40_000])
def test_a_window_is_full_of_newest_text_after_an_ingest(make, tokens):
  """With nothing asked, the coarsest tiling and newest text in the rest."""
  mc = make(recent_tokens=0)
  mc.ingest(tiny_base.text(tokens, 1))
  window = mc._loop.context.window
  assert 0 <= mc.config.window - len(window.entries) < BRANCHING
  raw = window.entries.level == 0
  newest = np.flatnonzero(~raw)[-1] + 1
  assert raw[newest:].all()
  others = len(raw) - len(raw[newest:]) - mc.config.sink_tokens
  assert others < 3 * BRANCHING, "gists of the rest"


class NothingMatters:
  """A policy that gives everything up."""

  touched = bytes_read = 0
  answerable, sources = 0.0, ()

  def score(self, view):
    return np.full(len(view.entries), -0.9, np.float32)

  def take_in(self, tree, context):
    del tree, context

  def warm_up(self, context):
    del context


def test_what_answers_is_read_alone_in_a_short_history_too(make, tiny_lm):
  mc = make(contrast=0.0, read_place="before")
  mc.ingest(tiny_base.text(100, 1))
  policy = NothingMatters()
  policy.answerable, policy.sources = 1.0, ((8, 20),)
  mc._loop._policy = policy
  out = mc.generate("what?", max_new_tokens=8)
  assert [(s.start, s.stop) for s in out.sources] == [(8, 20)]
  ids = mc.tree.tokens(0, mc.cursor)
  begin, table = mc.cursor - 8, np.asarray(tiny_lm.params["embed"])
  for at in range(begin, mc.cursor):
    seen = np.array([0, *range(8, 20), *range(begin - out.prompt_tokens, at)])
    logits = tiny_base.plain_logits(
      tiny_lm, table[ids[seen]], np.arange(len(seen)))
    assert int(np.argmax(logits[-1])) == ids[at]


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


def test_a_system_prompt_is_no_history_that_answers(make, tiny_lm):
  lm = dataclasses.replace(
    tiny_lm, tokenizer=tiny_base.byte_tokenizer(chat=True))
  mc = make(lm=lm, policy="lensnet")  # untrained: it is half sure of all
  fact = "THE PUMP CODE IS 7314. " + tiny_base.text(40, 1)
  asked = dict(max_new_tokens=1, remember=False)
  out = mc.generate("the PUMP CODE?", **asked, system=fact)
  assert out.answerable == 0 and out.sources == []
  mc.ingest(fact, name="a")
  assert mc.generate("the PUMP CODE?", **asked).answerable > 0.1
  mc.forget("a")
  assert mc.generate("the PUMP CODE?", **asked, system=fact).answerable == 0


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
sys.path.insert(0, {root!r})
import mcjax
from mcjax.testing import tiny_base
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
  root = pathlib.Path(__file__).parents[2]
  result = str(folder / "result.json")
  code = RESUME.format(
    root=str(root), urls=urls, result=result
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
  mc.tree.close()  # drops it, as a crash does
  mc._closed = True
  again = MegaContext.open(mc.tree.url, tiny_lm, gistnet=tiny_gistnet)
  assert again.cursor == 701 and again.focus() == focus
  again.close()


def test_a_turn_that_fails_leaves_everything_as_before(make, tiny_lm,
                                                       tiny_gistnet):
  mc = make()
  mc.ingest(tiny_base.text(700))
  mc.next_logits()  # runs the window; from now on only the newest token
  before = mc.cursor, mc.focus(), mc.next_logits()

  def stop(*_):
    raise KeyboardInterrupt

  for fail in (
    lambda: mc.generate("what?", max_new_tokens=40, on_text=stop),
    lambda: mc.ingest(tiny_base.text(900, 1), progress=stop),
  ):
    with pytest.raises(KeyboardInterrupt):
      fail()
    assert (mc.cursor, mc.focus()) == before[:2]
    # What was overwritten is computed again, not kept: equal but for rounding.
    np.testing.assert_allclose(mc.next_logits(), before[2], atol=2e-5)
  with MegaContext.open(mc.tree.url, tiny_lm, gistnet=tiny_gistnet, mode="r"
                        ) as reader:
    assert reader.generate("what?", max_new_tokens=2, remember=False).text
    for write in (lambda: reader.ingest("x"), lambda: reader.generate("x")):
      with pytest.raises(McjaxError, match='mode="r"'):
        write()
    assert not reader.refresh()
    mc.ingest("more")
    assert reader.refresh() and reader.cursor == mc.cursor


# --- Cost --------------------------------------------------------------------


@pytest.mark.parametrize("longest", [50_000, *further(300_000)])
def test_the_cost_of_a_step_does_not_grow_with_the_history(make, longest):
  """Counted work of one turn at 10,000 tokens of history and at many more."""
  costs = []
  for history in (10_000, longest):
    # So few nodes that the short history is not read as a whole either.
    mc = make(gist_attention="visible", search_nodes=32, settle_steps=8)
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
  assert large["nodes_touched"] <= 32 * steps
  assert sum(large[f"rows of {k}"] for k in tree.reads) < 1000 * steps


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
