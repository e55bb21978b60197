"""Answers: how they are drawn, stopped, streamed and cut off; many at once."""

import dataclasses
import threading

import numpy as np
import pytest
from runtime_cases import SMALL

from mcjax import Config, McjaxError, MegaContext
from mcjax.runtime.answer_text import AnswerText
from mcjax.runtime.telemetry import compile_count
from mcjax.testing import tiny_base


@pytest.fixture
def mc(make):
  mc = make()
  mc.ingest(tiny_base.text(100, 1))
  return mc


def said(mc, **settings):
  out = mc.generate("hm", 20, remember=False, **settings)
  return out.token_ids.tolist()


def test_the_same_seed_says_the_same_and_two_calls_differ(mc):
  assert said(mc, temperature=1.0) != said(mc, temperature=1.0)
  assert said(mc, temperature=1.0, seed=3) == said(mc, temperature=1.0, seed=3)
  text = mc.generate("hm", 20, remember=False, temperature=1.0, seed=3).text
  pieces = mc.stream("hm", 20, remember=False, temperature=1.0, seed=3)
  assert "".join(pieces) == text


@pytest.mark.parametrize("cut", [
  dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=0.0)])
def test_the_sharpest_cut_is_greedy(mc, cut):
  greedy = said(mc)
  assert said(mc, **{"temperature": 2.0, **cut}) == greedy
  assert said(mc, repetition_penalty=50.0) != greedy


def test_no_setting_compiles_anything(mc):
  said(mc)
  before = compile_count()
  said(mc, temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, seed=1)
  said(mc, repetition_penalty=1.3, stop=["zz"], logprobs=True)
  assert compile_count() == before


def test_samples_follow_the_softmax(mc):
  """A chi-square test of the first token, through the device loop.

  tests/window/test_sampling.py draws more, under every setting.
  """
  mc.generate("hm", 0)
  logits = np.asarray(mc.next_logits(), np.float64)
  chance = np.exp(logits - logits.max())
  chance /= chance.sum()
  context, count = mc._loop.context, 100
  snapshot = context.snapshot()
  drawn = []
  for i in range(count):
    draw = mc._loop.draw(_sampling(1.0), seed=i)
    job = context.ask(1, draw)
    said = context.decoder.run([job])[0]
    drawn.append(int(said.tokens[0]))
    context.take(job, said)
    context.restore(snapshot)
    snapshot = context.snapshot()
  top = np.argsort(-chance)[:8]
  expected = np.append(chance[top], 1 - chance[top].sum()) * count
  found = np.array([drawn.count(int(t)) for t in top])
  found = np.append(found, count - found.sum())
  statistic = float(np.sum((found - expected) ** 2 / expected))
  assert statistic < 26.1  # p = 0.001 at 8 degrees of freedom


def _sampling(temperature):
  from mcjax.window.sampling import Sampling
  return Sampling(temperature=temperature)


def test_a_stop_string_ends_the_answer_wherever_tokens_end(mc):
  full = mc.generate("hm", 40, remember=False)
  stop = full.text[9:12]
  cut = mc.generate("hm", 40, stop=[stop], remember=False)
  assert cut.text == full.text[: full.text.index(stop)]
  assert cut.stop_reason == "stop" and full.stop_reason == "length"
  pieces = list(mc.stream("hm", 40, stop=stop, remember=False))
  assert "".join(pieces) == cut.text and len(repr(cut)) < 160


def test_the_likeliest_tokens_are_listed(mc):
  out = mc.generate("hm", 5, top_logprobs=4, remember=False)
  ids, values = out.likely
  assert ids.shape == values.shape == (5, 4)
  np.testing.assert_array_equal(ids[:, 0], out.token_ids)  # greedy
  np.testing.assert_array_equal(values[:, 0], out.logprobs)
  assert np.all(np.diff(values, axis=1) <= 0) and np.all(values <= 0)
  with pytest.raises(McjaxError, match="top_logprobs"):
    mc.generate("hm", 5, top_logprobs=21)


def test_a_system_prompt_is_kept_and_told_every_turn(tiny_lm, tiny_gistnet):
  lm = dataclasses.replace(
    tiny_lm, tokenizer=tiny_base.byte_tokenizer(chat=True))
  url = tiny_base.memory_url()
  with MegaContext.create(url, lm, Config(**SMALL), gistnet=tiny_gistnet,
                          system="BE BRIEF") as mc:
    mc.generate("a", 1)
    mc.generate("b", 1, system="BE LOUD")
    mc.generate("c", 1, system="")
    mc.generate([{"role": "system", "content": "BE SLOW"},
                 {"role": "user", "content": "d"}], 1)
    text = mc.text(0, mc.cursor)
    assert text.index("BE BRIEF") < text.index("BE LOUD") < text.index(
      "BE SLOW")
    assert text.count("BE ") == 3
  with MegaContext.open(url, lm, gistnet=tiny_gistnet) as mc:
    assert mc.system == "BE BRIEF"
    mc.generate("e", 1)
    assert mc.text(0, mc.cursor).count("BE BRIEF") == 2
  with MegaContext.open(url, lm, gistnet=tiny_gistnet, system="NO") as mc:
    assert mc.system == "NO"
    with pytest.raises(McjaxError, match="system"):
      mc.generate("f", 1, system=3)


def test_half_characters_are_kept_back(tiny_lm):
  answer, pieces = AnswerText(tiny_lm.tokenizer), []
  for i in tiny_lm.tokenizer.encode("a😀中b").tolist():
    answer.add(np.array([i]), False)
    pieces.append(answer.piece())
  assert "".join(pieces) == "a😀中b" and "\ufffd" not in "".join(pieces)


def test_a_consumer_that_fails_or_leaves_closes_the_turn(mc):
  def fail(piece):
    raise RuntimeError("no more")

  before = mc.cursor
  with pytest.raises(RuntimeError, match="no more"):
    mc.generate("hm", 40, on_piece=fail)
  assert before < mc.cursor == mc.tree.committed
  stream = mc.stream("hm", 200)
  next(stream)
  stream.close()
  assert mc.cursor == mc.tree.committed < before + 100
  assert len(said(mc)) == 20


def test_an_interrupt_in_mid_step_undoes_the_turn(mc, monkeypatch):
  mc.next_logits()
  before, focus, calls = mc.cursor, mc.focus(), []
  expected = said(mc)
  real = mc._loop.remember

  def remember(ids):
    calls.append(ids)
    if len(calls) == 2:
      raise KeyboardInterrupt
    real(ids)

  with monkeypatch.context() as patch:
    patch.setattr(mc._loop, "remember", remember)
    with pytest.raises(KeyboardInterrupt):
      mc.generate("hm", 40)
  assert (mc.cursor, mc.focus()) == (before, focus)
  assert said(mc) == expected


def test_threads_share_a_handle(mc):
  answers, errors = {}, []

  def work(i):
    try:
      answers[i] = said(mc)
      mc.search("hm")
    except BaseException as error:
      errors.append(error)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors and len({tuple(a) for a in answers.values()}) == 1


def test_a_prompt_knows_what_the_user_said_before_it():
  """In the history, or among the messages that it comes with."""
  lm = tiny_base.make_lm(chat=True)
  mc = MegaContext.create(tiny_base.memory_url(), lm, Config(**SMALL))

  def before() -> str:
    return lm.tokenizer.decode(mc._loop.query.before).strip()

  mc.ingest(tiny_base.text(600, 3))
  mc.generate("Who runs the mill?", max_new_tokens=2)
  assert before() == ""
  mc.generate("And since when?", max_new_tokens=2)
  assert before() == "Who runs the mill?"
  mc.ingest(tiny_base.text(100, 4))
  mc.generate("Why?", max_new_tokens=2)
  assert before() == "And since when?"
  mc.generate([{"role": "user", "content": "Who is Ada?"},
               {"role": "assistant", "content": "A miller."},
               {"role": "user", "content": "Where?"}], max_new_tokens=2)
  assert before() == "Who is Ada?"
  mc.generate("Once more", max_new_tokens=2, template=False)
  assert before() == ""
  mc.close()
