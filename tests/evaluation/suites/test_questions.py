"""The questions suite, end to end on a tiny base."""

import json

import pytest
from untimed import untimed

from mcjax.evaluation import runner
from mcjax.evaluation.data import natural
from mcjax.evaluation.suites import questions
from mcjax.evaluation.systems import make
from mcjax.evaluation.systems.models import Models
from mcjax.gist.encoder import load_gistnet
from mcjax.testing import tiny_base
from mcjax.types import McjaxError


def documents():
  out = []
  for n in range(4):
    parts = tuple(f"{tiny_base.text(150, 10 * n + i)} The KEY{n}{i} is gold{i}."
                  " \n\n" for i in range(6))
    out.append(natural.Document(f"T{n}", parts, tuple(
      natural.Asked(f"What is the KEY{n}{i}?", (f"gold{i}",), (i,))
      for i in range(6))))
  return out


SETTINGS = questions.Settings(
  systems=("sink", "bm25", "evidence", "none", "megacontext/oracle",
           "megacontext/similarity"),
  reference="megacontext/similarity", window=512, history=2000, histories=1,
  questions=4, others=2, answer_tokens=4)


@pytest.fixture(scope="module")
def models():
  lm = tiny_base.make_lm(chat=True)
  return Models(lm, load_gistnet(lm))


@pytest.fixture(scope="module")
def ran(models, tmp_path_factory):
  folder = tmp_path_factory.mktemp("questions")
  report = questions.measure(models, documents(), SETTINGS, folder, "gold1")
  report.write(folder)
  return folder, {k: v.value for k, v in report.figures.items()}, report


def test_told_systems_have_all_the_evidence(ran):
  _, figures, _ = ran
  for name in ("evidence", "megacontext/oracle"):
    assert figures[f"evidence/{name}/view_recall"] == 1
    assert figures[f"evidence/{name}/view_found/low"] == 1
  assert figures["evidence/none/view_recall"] == 0
  assert figures["questions"] == 4
  assert figures["evidence/bm25/view_found/n"] == 4


def test_rivals_get_as_many_tokens_as_the_reference(ran):
  _, figures, _ = ran
  wanted = figures["evidence/megacontext/similarity/view_tokens"]
  for name in ("sink", "bm25"):
    assert figures[f"equal/{name}/equal_tokens"] == wanted
    assert figures[f"evidence/{name}/view_tokens"] > wanted


def test_answers_floors_and_what_cannot_be_known(ran):
  folder, figures, _ = ran
  assert figures["answers/most frequent: gold1/f1"] >= 0
  assert figures["answers/constant: I do not know./declines"] == 1
  for name in ("bm25", "none"):
    asked = f"unanswerable/{name}"
    assert figures[f"{asked}/declines/n"] == figures[f"{asked}/invents/n"] == 2
    assert figures[f"{asked}/invents"] == 1 - figures[f"{asked}/declines"]
    assert figures[f"{asked}/invents/low"] <= figures[f"{asked}/invents/high"]
    assert figures[f"{asked}/forwarded"] > 0
  assert figures["answers/sink/forwarded"] > 400
  text = (folder / "results.md").read_text()
  assert "fairytale validation" in text and "− megacontext/similarity" in text


def test_a_second_run_measures_nothing_and_says_the_same(
    ran, models, monkeypatch):
  folder, *_ = ran
  before = json.loads((folder / "results.json").read_text())["figures"]
  monkeypatch.setattr(questions, "_ask_all", pytest.fail)
  again = questions.measure(models, documents(), SETTINGS, folder, "gold1")
  again.write(folder)
  assert json.loads((folder / "results.json").read_text())["figures"] == before


def test_the_same_seed_gives_the_same_figures(ran, models, tmp_path):
  again = questions.measure(models, documents(), SETTINGS, tmp_path, "gold1")
  assert untimed(again) == untimed(ran[2])


def test_the_same_seed_finds_the_same_without_answers(ran, models, tmp_path):
  _, figures, _ = ran
  few = questions.dataclasses.replace(
    SETTINGS, evidence_only=True, systems=SETTINGS.systems[-1:])
  report = questions.measure(models, documents(), few, tmp_path)
  for name, figure in report.figures.items():
    if name.startswith("evidence/"):
      assert figure.value == figures[name], name
  assert not any(n.startswith("answers") for n in report.figures)


def test_full_attention_is_asked_where_the_positions_reach(models, tmp_path):
  lm, s = models.lm, questions.dataclasses.replace(
    SETTINGS, evidence_only=True, systems=("sink", "full"), reference="sink")
  assert lm.config.max_positions == 2048
  for history, there in ((1000, True), (2000, False)):
    report = questions.measure(
      models, documents(), questions.dataclasses.replace(s, history=history),
      tmp_path)
    assert ("evidence/full/view_recall" in report.figures) == there
  alone = questions.dataclasses.replace(s, reference="full")
  with pytest.raises(McjaxError, match="full does not fit"):
    questions.measure(models, documents(), alone, tmp_path)


def test_a_conversation_goes_on(models, tmp_path):
  talk = questions.dataclasses.replace(
    SETTINGS, conversation=True, others=0,
    systems=("megacontext/similarity", "sink"))
  report = questions.measure(models, documents(), talk, tmp_path)
  assert report.figures["answers/sink/f1/n"].value == 4


def test_mistakes_are_told_in_one_line():
  with pytest.raises(McjaxError, match="no system 'rag'"):
    questions.Settings(systems=("rag",))
  with pytest.raises(McjaxError, match="none of the systems"):
    questions.Settings(systems=("bm25",))
  with pytest.raises(McjaxError, match="needs its answers"):
    questions.Settings(conversation=True, evidence_only=True)
  with pytest.raises(McjaxError, match="cannot read"):
    runner.run("questions", {"data": "/nowhere/at/all.xz"}, "unused")


def test_the_default_systems_are_known():
  for name in questions.Settings().systems:
    make.check(name)
