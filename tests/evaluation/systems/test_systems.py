"""Every system: what it sees, says and expects, beside plain forwards."""

import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import model
from mcjax.evaluation.systems import make, retrieval, system
from mcjax.evaluation.systems.models import Models
from mcjax.gist.encoder import load_gistnet
from mcjax.testing import tiny_base
from mcjax.types import McjaxError

WINDOW = 512
FACT = " The pump code is 7314 today. "
TEXT = tiny_base.text(704, 1) + FACT + tiny_base.text(800, 2)
PLACE = (704, 704 + len(FACT))  # where a chunk begins
QUESTION = "What is the pump code?"


class Letters:
  """Stands in for the embedding model: counts of letters."""

  def encode(self, texts):
    out = np.ones((len(texts), 256))
    for row, text in zip(out, texts):
      np.add.at(row, np.frombuffer(text.lower().encode(), np.uint8), 1.0)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def chat_lm():
  return tiny_base.make_lm(chat=True)


@pytest.fixture(scope="module")
def maker(chat_lm, tmp_path_factory):
  return make.Maker(
    Models(chat_lm, load_gistnet(chat_lm)), WINDOW,
    tmp_path_factory.mktemp("trees"),
    retriever=retrieval.Retriever(chat_lm.tokenizer, 64, Letters))


@pytest.fixture(scope="module")
def ids(chat_lm):
  return chat_lm.tokenizer.encode(TEXT)


NAMES = (*make.NAMES, "megacontext/recency", "megacontext/oracle",
         "bm25+turn", "evidence+turn")


@pytest.mark.parametrize("name", NAMES)
def test_every_system_answers_within_the_window(maker, ids, name):
  asked = maker.make(name)
  history = ids[:900] if name == "full" else ids
  asked.ingest(history)
  out = asked.answer(QUESTION, 8, evidence=(PLACE,))
  again = asked.answer(QUESTION, 8, evidence=(PLACE,))
  assert out.text == again.text, "nothing is remembered"
  assert out.look.view == again.look.view
  assert out.forwarded > 0 and out.seconds > 0
  size = system.size(out.look.view)
  assert size <= len(history) if name == "full" else size <= WINDOW
  assert system.shared(out.look.read, out.look.view) == system.size(
    out.look.read)
  seen = asked.look(QUESTION, evidence=(PLACE,))
  if name != "full":
    assert system.size(seen.view) <= WINDOW
  if name.startswith(("evidence", "bm25", "fusion")) or "oracle" in name:
    assert system.shared(seen.view, (PLACE,)) == PLACE[1] - PLACE[0]
  if name == "none":
    assert not seen.view
  asked.close()


@pytest.mark.parametrize("name", ["bm25", "dense", "fusion", "sliding", "sink"])
def test_a_budget_is_used_up_exactly(maker, ids, name):
  asked = maker.make(name)
  asked.ingest(ids)
  assert system.size(asked.look(QUESTION, budget=200).view) == 200
  assert not asked.look(QUESTION, budget=0).view


def test_an_answer_is_that_of_a_plain_forward(maker, ids, chat_lm):
  asked = maker.make("evidence")
  asked.ingest(ids)
  out = asked.answer(QUESTION, 6, evidence=(PLACE,))
  line = chat_lm.tokenizer.encode("\n")
  turn, _ = chat_lm.tokenizer.chat_turn(QUESTION, first=False)
  text = [*ids[PLACE[0] : PLACE[1]], *line, *turn]
  start = len(text)
  for _ in range(6):
    plain = model.logits(chat_lm.params, chat_lm.config,
                         np.array(text, np.int32))
    text.append(int(jnp.argmax(plain[-1])))
    if text[-1] in chat_lm.tokenizer.stop_ids:
      break
  assert out.text == chat_lm.tokenizer.decode(text[start:])
  assert out.forwarded == len(text)


@pytest.mark.parametrize("name", ["none", "full", "evidence+turn"])
def test_the_words_of_a_prompt(maker, ids, chat_lm, name):
  asked = maker.make(name)
  asked.ingest(ids[:600] if name == "full" else ids)
  view = asked.look(QUESTION, evidence=(PLACE,)).view
  prompt = chat_lm.tokenizer.decode(
    asked._prompt(view, QUESTION).tolist(), keep_special=True)
  tail = f"<|turn|>user: {QUESTION}<|stop|><|turn|>assistant: "
  if name == "full":
    assert prompt == f"{TEXT[:600]}\n{tail}"
  elif name == "none":
    assert prompt == tail
  else:
    words = TEXT[PLACE[0] : PLACE[1]]
    assert prompt == (f"<|turn|>user: {words}\n\n{QUESTION}<|stop|>"
                      "<|turn|>assistant: ")


@pytest.mark.parametrize("before", [0, 1, 255, 256, 300])
def test_losses_are_those_of_a_plain_forward(maker, ids, chat_lm, before):
  part = ids[before : before + 70]
  found = maker.reader.nll(ids[:before], part)
  expected = tiny_base.plain_nll(chat_lm, ids[: before + 70])[before:]
  np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["none", "full", "sink", "bm25",
                                  "megacontext"])
def test_every_system_has_losses(maker, ids, name):
  asked = maker.make(name)
  asked.ingest(ids[:800])
  found = asked.nll(ids[800:930])
  assert found.shape == (130,)
  assert np.isfinite(found[1:]).all()
  np.testing.assert_array_equal(found, asked.nll(ids[800:930]))
  asked.close()


def test_a_window_that_holds_all_is_full_attention(maker, ids):
  both = []
  for name in ("full", "sink"):
    asked = maker.make(name)
    asked.ingest(ids[:200])
    both.append(asked.nll(ids[200:264]))
  np.testing.assert_allclose(*both, atol=2e-4)


def test_a_conversation_stands_in_the_prompt(maker, ids, chat_lm):
  asked = maker.make("sink")
  asked.ingest(ids)
  first = asked.answer("Who?", 4, remember=True)
  prompt = chat_lm.tokenizer.decode(
    asked._prompt((), "And now?").tolist(), keep_special=True)
  assert prompt.startswith("<|turn|>user: Who?<|stop|><|turn|>assistant: "
                           + first.text)
  assert prompt.count("<|turn|>user") == 2
  assert asked.answer("And now?", 4).look.view != first.look.view


def test_the_loop_remembers_when_asked(maker, ids):
  asked = maker.make("megacontext")
  asked.ingest(ids)
  cursor = asked._mc.cursor
  asked.answer(QUESTION, 4)
  assert asked._mc.cursor == cursor
  asked.answer(QUESTION, 4, remember=True)
  assert asked._mc.cursor > cursor
  asked.ingest(ids)  # what was said is not in the tree
  assert asked._mc.cursor == cursor
  asked.close()


def test_looking_runs_no_lm(maker, ids, monkeypatch):
  from mcjax.window.context_lm import ContextLM
  asked = maker.make("megacontext")
  asked.ingest(ids)
  monkeypatch.setattr(ContextLM, "sync", lambda *_, **__: pytest.fail("ran"))
  assert asked.look(QUESTION).view
  asked.close()


def test_gists_are_shown_where_the_name_says(maker, ids):
  for name, shown in (("megacontext+hidden", False), ("megacontext", False),
                      ("megacontext+gists", True)):
    asked = maker.make(name)
    asked.ingest(ids)
    assert asked._mc._loop.context.show_gists == shown
    asked.close()


def test_wrong_names_and_wishes_are_told(maker, ids, chat_lm):
  for name in ("rag", "megacontext/best", "bm25+gists", "megacontext+seen",
               "full/recency"):
    with pytest.raises(McjaxError, match="no system"):
      maker.make(name)
  full = maker.make("full")
  full.ingest(np.tile(ids, 3))
  with pytest.raises(McjaxError, match="do not fit"):
    full.answer(QUESTION, 4)
  with pytest.raises(McjaxError, match="needs a question"):
    maker.make("evidence").nll(ids)


def test_spans():
  assert system.merged([(5, 9), (0, 3), (2, 4), (9, 9)]) == ((0, 4), (5, 9))
  assert system.shared(((0, 4), (8, 10)), ((3, 9),)) == 2
  assert system.runs(np.array([1, 2, 5])) == ((1, 3), (5, 6))
  assert system.difference(((0, 4),), ((2, 8),)) == (4, 2)
  gap = np.array([-1])
  out = system.gathered(np.arange(9), ((0, 2), (4, 5)), gap)
  assert out.tolist() == [0, 1, -1, 4]
