"""LensNet's training: labels by construction, steps, resuming, a whole run."""

import dataclasses
import json
import lzma
import os
import re
import types

import jax
import numpy as np
import pytest

from mcjax.answer.matching import Matcher
from mcjax.lens import network as lensnet
from mcjax.lens import policy as lensnet_policy
from mcjax.lens.features import BURIED, RAW, row_features
from mcjax.lens.keyer import LensKeyer
from mcjax.testing import tiny_base
from mcjax.training.common import data
from mcjax.training.lens import (
  effects,
  facts,
  histories,
  lists,
  losses,
  other_words,
  prompts,
  windows,
  world,
)
from mcjax.training.lens import questions as natural
from mcjax.training.lens import run as lens_run
from mcjax.training.lens import trainer as lens_trainer
from mcjax.training.lens.losses import LensObjective
from mcjax.training.lens.trainer import LensTrainConfig
from mcjax.types import BRANCHING, McjaxError
from mcjax.window.counterfactual import (
  Candidate,
  edit_losses,
  slot_gradients,
)
from mcjax.window.working_context import EXPAND

SIZES = dict(width=8, heads=2, layers=1, feature_width=8, match_dim=8,
             key_dim=8)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, lm):
  folder = tmp_path_factory.mktemp("text")
  rng = np.random.default_rng(0)
  words = [tiny_base.text(6, i).strip() or "x" for i in range(200)]
  for split in ("train", "validation"):
    made = []
    for i in range(3):
      text = ". ".join(" ".join(rng.choice(words, 8)) for _ in range(80))
      made.append((f"{split}-{i}", np.asarray(lm.tokenizer.encode(text))))
    data.write_kind(folder, split, "prose", made, lm.config.vocab_size)
  return {s: data.open_split(folder, s) for s in ("train", "validation")}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
  path = tmp_path_factory.mktemp("questions") / "tales-questions.jsonl.xz"
  records = []
  for split in ("train", "validation"):
    for i in range(2):
      sections = [{"id": str(k), "text": tiny_base.text(600, 10 * i + k)}
                  for k in range(3)]
      sections[1]["text"] += f" The pilot of ship {i} is KAI SOLHEIM."
      records.append({
        "split": split, "title": f"t{i}", "sections": sections, "questions": [
          {"question": f"Who is the pilot of ship {i}?", "sections": ["1"],
           "answers": ["Kai"]}] * 3})
  with lzma.open(path, "wt") as lines:
    lines.writelines(json.dumps(r) + "\n" for r in records)
  return path


def config_of(questions, **train):
  return lens_run.LensRunConfig(
    lens_run.LensWindows(
      (str(questions),), passes=1, facts=1, cloze=1, code=0, reworded=1,
      listed=1, text=1, validation=1, length=2048, window=256),
    LensObjective(), LensTrainConfig(**{**dict(
      steps=6, batch=8, warmup=1, save_every=2, evaluate_every=3), **train}),
    (("tales", 2.0), ("facts", 1.0), ("cloze", 1.0),
     ("reworded", 1.0), ("listed", 1.0), ("text", 1.0)),
    tuple(sorted(SIZES.items())))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, lm, encoder, stores, questions):
  folder = tmp_path_factory.mktemp("run")
  run = lens_run.LensRun(lm, encoder, config_of(questions), stores, folder)
  assert run.run()
  return run


def test_a_question_knows_the_section_that_answers(lm, questions):
  (ids, asked), _ = natural.read_questions(questions, "train", lm.tokenizer)
  question, [(a, b)], best, _ = asked[0]
  assert "KAI SOLHEIM" in lm.tokenizer.decode(ids[a:b])
  told = [lm.tokenizer.decode(ids[x:y]) for x, y in best]
  assert all(a <= x < y <= b for x, y in best)
  assert any("KAI SOLHEIM" in text for text in told), told
  history = next(iter(natural.question_histories(
    [(ids, asked)], lm.tokenizer, 0)))
  for example in history.examples:
    assert example.asked and example.cursor == len(history.ids)
    for a, b in example.gold:
      assert "KAI SOLHEIM" in lm.tokenizer.decode(history.ids[a:b])
  assert question.startswith("Who is")


def test_what_is_taken_out_of_a_text_stood_where_it_says(lm, stores):
  source = histories.TextHistories(stores["train"], lm.tokenizer, 3, 2048)
  history = source.cloze(0)
  assert any(example.gold for example in history.examples)
  for example in history.examples:
    for a, b in example.gold:
      assert 0 <= a < b <= len(history.ids)


def test_a_quotation_asks_for_the_passage_that_it_repeats(lm, stores):
  source = histories.TextHistories(stores["train"], lm.tokenizer, 3, 2048)
  quoted = 0
  for number in range(8):
    history = source.cloze(number)
    for example in history.examples:
      asked = lm.tokenizer.decode(example.query)
      found = re.search(r'(?:says?|after|wrote|steht) "(.{12,})"', asked)
      if found and example.gold:
        [(a, b)] = example.gold
        told = lm.tokenizer.decode(history.ids[a:b])
        quoted += found[1].casefold() in told.casefold()
  assert quoted


@pytest.mark.parametrize("kind", ["cloze", "facts", "reworded", "listed"])
def test_some_prompts_are_about_what_the_history_lacks(lm, stores, kind):
  """Natural questions about other texts, and others like those it answers."""
  strangers = ["Why did the miller's daughter weep?"]
  source = histories.TextHistories(
    stores["train"], lm.tokenizer, 3, 2048, strangers=strangers)
  strange = alike = answered = 0
  for number in range(8):
    history = getattr(source, kind)(number, 8)
    text = lm.tokenizer.decode(history.ids)
    for example in history.examples:
      asked = lm.tokenizer.decode(example.query)
      answered += bool(example.gold)
      if "miller" in asked.casefold():
        assert not example.gold and "miller" not in text
        strange += 1
      elif not example.gold:
        alike += 1
  assert answered > strange + alike and strange and alike


def test_a_name_asks_for_its_definition(lm):
  text = "".join(
    f"def probe_{i}(x):\n  return probe_{(i + 1) % 40}(x) + {i}\n\n"
    for i in range(40)) * 1 + "z = 1\n" * 100
  ids = np.asarray(lm.tokenizer.encode(text), np.int32)
  store = types.SimpleNamespace(
    offsets=np.array([0, len(ids)]), document=lambda _: ids)
  source = histories.TextHistories({"code": store}, lm.tokenizer, 0, 1500)
  history = source.code(0)
  answered = [example for example in history.examples if example.gold]
  assert len(answered) > 10
  for example in answered:
    [(a, b)] = example.gold
    asked = lm.tokenizer.decode(example.query).casefold().replace(" ", "_")
    told = lm.tokenizer.decode(history.ids[a:b]).strip()
    name = re.match(r"def (\w+)\(", told)[1]
    assert name in asked


def test_what_has_changed_is_asked_for_as_it_is_now(lm, stores):
  """What was told before stands earlier, and is not what answers."""
  rng = np.random.default_rng(0)
  before, now = facts.draw_changed(rng)
  assert before.name == now.name and before.text != now.text
  source = histories.TextHistories(stores["train"], lm.tokenizer, 1, 2048)
  seen = 0
  for number in range(8):
    history = source.facts(number, count=12)
    for example in history.examples[:12]:
      [(start, stop)] = example.gold
      lead = lm.tokenizer.decode(history.ids[max(0, start - 24) : start])
      if lead.strip().endswith(("Correction:", "Actually,", "An update:",
                                "changed.", "wrong.", "mistaken before.")):
        seen += 1
        assert start > BRANCHING and stop <= len(history.ids)
  assert seen


def test_facts_are_where_they_are_said_to_be(lm, stores):
  chat = dataclasses.replace(
    lm, tokenizer=tiny_base.byte_tokenizer(chat=True))
  for one in (lm, chat):
    source = histories.TextHistories(
      stores["train"], one.tokenizer, 1, 2048)
    history = source.facts(2, count=6)
    told = [e for e in history.examples if e.gold]
    [several] = told[6:]
    assert [len(e.gold) for e in told[:6]] == [1] * 6
    assert 2 <= len(several.gold) <= 4
    assert set(several.gold) <= {e.gold[0] for e in told[:6]}
    assert any(not e.gold for e in history.examples)
    for a, b in (span for e in told for span in e.gold):
      text = one.tokenizer.decode(history.ids[a:b]).strip()
      assert text.endswith(".") and "<|" not in text


def test_a_question_leans_on_what_the_last_one_named():
  rng = np.random.default_rng(0)
  common = {"what", "who", "did", "the", "to", "do", "want", "was", "why", "a"}
  for question, last, kept in (
      ("What did the peasant want to do?", "Who was the peasant?",
       "What did | want to do?"),
      ("Why was Canonbie Dick's coin bad?", "Where did Canonbie Dick go?",
       "Why was |'s coin bad?"),
      ("What did the king want?", "Who was the peasant?", "")):
    told = prompts.leaning(question, last, common, rng)
    start, _, end = kept.partition("|")
    assert told.startswith(start) and told.endswith(end)
    assert (told == question) == (not kept)
    assert "peasant" not in told and "Dick" not in told


def test_a_conversation_leans_on_its_own_turns(lm, stores):
  """The turn before a prompt is the user's last one, and stands before it."""
  chat = tiny_base.byte_tokenizer(chat=True)
  seen = leant = 0
  for number in range(16):
    source = histories.TextHistories(stores["train"], chat, number, 2048)
    history = source.facts(number, count=8)
    for last, example in zip((None, *history.examples), history.examples):
      if example.before is None:
        continue
      seen += 1
      assert last is not None
      np.testing.assert_array_equal(example.before, last.query)
      told = chat.decode(history.ids[last.cursor : example.cursor])
      assert chat.decode(last.query) in told
      assert all(b <= example.cursor for _, b in example.gold)
      asked = set(prompts.words_of(chat.decode(example.query)))
      leant += bool({"he", "she", "it", "they", "them", "him", "her"} & asked)
  assert seen > 10 and leant > 1


def test_facts_and_questions_come_in_many_wordings():
  rng = np.random.default_rng(0)
  drawn = [facts.draw(rng) for _ in range(300)]
  assert len({d.text.split()[0] for d in drawn}) > 20
  assert len({" ".join(d.question.split()[:3]) for d in drawn}) > 25


def test_facts_of_a_history_seldom_share_a_word_of_their_names():
  rng = np.random.default_rng(0)
  shared = 0
  for _ in range(40):
    words = [{*facts.draw(rng).name.split()} for _ in range(24)]
    shared += sum(bool(words[i] & set().union(*words[:i])) for i in range(24))
  assert shared < 0.055 * 40 * 24


def test_facts_in_other_words_share_no_telling_word_with_their_questions(
    lm, stores):
  common = set("s its a an and after any at before did does do for from how in "
               "is it "
               "of on or the their there to was were what when where which who "
               "whose why with his her man woman made people every".split())
  for split in ("train", "validation"):
    for fact, question in other_words.facts(split):
      told, asked = (set(re.findall(r"\w+", t.casefold()))
                     for t in (fact, question))
      assert not (told & asked) - common, (fact, question)
  assert not set(other_words.facts("train")) & set(
    other_words.facts("validation"))
  source = histories.TextHistories(stores["train"], lm.tokenizer, 3, 2048)
  history = source.reworded(0, 5)
  assert any(example.gold for example in history.examples)
  for a, b in (span for e in history.examples for span in e.gold):
    assert lm.tokenizer.decode(history.ids[a:b]).strip() in {
      fact for fact, _ in other_words.facts("train")}


def test_the_world_is_asked_about_only_where_a_text_lacks_it(lm, stores):
  question = "How high is Mount Kilimanjaro?"
  assert question in world.QUESTIONS
  assert question in world.lacking({"high", "mount"})
  assert question not in world.lacking({"high", "mount", "kilimanjaro"})
  source = histories.TextHistories(stores["train"], lm.tokenizer, 3, 2048)
  asked = [example for number in range(4) for example in source.facts(
    number, 12).examples]
  about = [example for example in asked if any(
    question.casefold().rstrip("?. ")[8:]
    in lm.tokenizer.decode(example.query).casefold()
    for question in world.QUESTIONS)]
  assert about and not any(example.gold for example in about)


def test_a_key_is_looked_up_in_the_lines_that_hold_it(lm, stores):
  """All of its lines and no other, and none for a key that has no line."""
  source = histories.TextHistories(stores["train"], lm.tokenizer, 3, 2048)
  several = lacking = bare = 0
  for number in range(12):
    rng = np.random.default_rng([3, 7, number])
    drawn = lists.draw(rng)
    assert len(drawn.entries) <= lists.MOST
    lines = {line for _, line in drawn.entries}
    assert not set(drawn.missing) & {key for key, _ in drawn.entries}
    history = source.listed(number, 16)
    first = lm.tokenizer.decode(history.ids[:32]).split("\n")[0]
    bare += any(line.startswith(first) for line in lines)
    for example in history.examples:
      asked = lm.tokenizer.decode(example.query)
      told = [lm.tokenizer.decode(history.ids[a:b]).strip("\n")
              for a, b in example.gold]
      assert set(told) <= lines
      keys = {key for key, line in drawn.entries if line in told}
      assert all(key.casefold() in asked.casefold() for key in keys)
      for key in keys:  # every line of a key that is asked for
        assert {line for k, line in drawn.entries if k == key} <= set(told)
      several += len(keys) > 1
      lacking += not keys
  assert several and lacking
  assert 0 < bare < 12, "some lists have no text around them"


def test_a_block_is_worth_what_it_saves(lm, encoder, stores, monkeypatch):
  """As measured with the block in the window, and without."""
  monkeypatch.setattr(effects, "_RAW", 2)  # others are estimated
  source = histories.TextHistories(stores["train"], lm.tokenizer, 1, 2048)
  history = source.text(0, 2)
  policy = lensnet_policy.load_lensnet(lm, gistnet=encoder)
  measured = effects.Effects(lm, encoder, policy, window=256)
  maker = windows.WindowMaker(lm, encoder, policy.keyer)
  tree = maker.tree(history.ids[:0])
  matcher = Matcher(tree, maker.table)
  rng = np.random.default_rng(0)
  for example, window in measured.follow(tree, history):
    query, rows = maker.look(tree, matcher, example, rng, window)
    features = row_features(tree, rows, query, matcher)
    before = len(window.entries)
    found = measured.label(rows, features, np.zeros(len(rows)),
                           example.future, rng)
    known = np.flatnonzero(np.isfinite(found))
    assert {int(s) for s in rows.state[known]} >= {RAW, BURIED}
    assert len(window.entries) == before, "nothing changes"
    legal = measured._loop.view().can_collapse[rows.entry]
    raw = np.flatnonzero((rows.state == RAW) & legal)
    assert np.isfinite(found[raw]).all() and len(raw) > effects._RAW
    slopes = slot_gradients(measured._context, tree, example.future)
    near = effects._SLOPE * np.array([
      slopes[a : a + BRANCHING].sum() for a in rows.entry[raw]])
    near = np.clip(effects._SCALE * (near - effects._SLOTS), -1, 1)
    alike = np.isclose(found[raw], near, atol=1e-4)
    assert alike.sum() == len(raw) - effects._RAW, "the others are exact"
    assert len(np.unique(near[alike])) > 1
    context, at = measured._context, known[rows.state[known] == BURIED][0]
    base, [loss] = edit_losses(context, tree, [Candidate(
      EXPAND, int(rows.entry[at]), int(rows.block[at]))], example.future)
    assert found[at] == pytest.approx(np.clip(
      effects._SCALE * (base - loss - effects._SLOTS), -1, 1), abs=1e-4)


def test_text_is_weighed_by_what_it_saved(lm, finished):
  """A block that saves is to be wished for, one that costs is not."""
  some = windows.WindowSet.load(sorted(
    (finished.workdir / "windows" / "train").glob("text*.npz")))
  inputs = some.inputs(np.arange(2), np.asarray(lm.params["embed"]))
  targets = some.targets(np.arange(2))
  assert np.isfinite(targets.worth).any() and not targets.gold.any()

  def weigh(worth):
    return losses.loss(
      finished.params, finished.lens, LensObjective(), inputs,
      targets._replace(worth=worth), jax.random.key(0), "text")[1]["weigh"]

  none = np.full_like(targets.worth, np.nan)
  assert float(weigh(none)) == 0.0
  up, down = none.copy(), none.copy()
  up[0, 0], down[0, 0] = 0.5, -0.5
  assert float(weigh(up)) > 0 and float(weigh(down)) > 0
  both = up.copy()
  both[0, 1] = -0.5
  assert float(weigh(both)) > float(weigh(up))


def test_windows_are_made_once_and_hold_what_the_policy_reads(
    finished, lm, encoder):
  files = sorted((finished.workdir / "windows" / "train").glob("*.npz"))
  assert {p.name.split("-")[0] for p in files} == {
    "tales", "facts", "cloze", "reworded", "listed", "text"}
  some = windows.WindowSet.load([p for p in files if "tales" in p.name])
  embed = np.asarray(lm.params["embed"], np.float32)
  inputs, targets = some.inputs(np.arange(2), embed), some.targets(
    np.arange(2))
  assert inputs.features.shape[0] == 2 and inputs.mask.any(axis=1).all()
  known = some.answerable & some.asked
  assert (some.gold[known] > 0).any(), "the searches find what answers"
  assert targets.gold.shape == inputs.mask.shape
  before = [os.stat(p).st_mtime_ns for p in files]
  maker = windows.WindowMaker(
    lm, encoder, LensKeyer(finished.params, finished.lens, lm))
  assert finished._make("train", maker) is not None
  assert [os.stat(p).st_mtime_ns for p in files] == before


def test_both_parts_learn_and_statistics_stay(finished):
  start = lensnet.init_params(finished.lens)
  trained = finished._trainer.score_params
  for part in lens_trainer.PARTS:
    old, new = start[part], trained[part]
    for name in ("feature_in", "feature_mid", "feature_score", "facts"):
      assert np.any(old[name]["kernel"] != new[name]["kernel"]), (part, name)
    normal = lens_trainer.normalised(
      start[part], finished._trainer._windows, part)
    np.testing.assert_array_equal(normal["mean"], new["mean"])


def test_a_run_goes_on_where_it_was(
    finished, lm, encoder, stores, questions, tmp_path):
  whole = finished._trainer.score_params
  files = finished.workdir / "windows"
  (tmp_path / "windows").symlink_to(files)
  for steps in (4, 6):
    run = lens_run.LensRun(
      lm, encoder, config_of(questions, steps=6), stores, tmp_path)
    keyer = LensKeyer(run.params, run.lens, lm)
    maker = windows.WindowMaker(lm, encoder, keyer)
    found = {k: windows.WindowSet.load(p)
             for k, p in run._make("train", maker).items()}
    trainer = lens_trainer.LensTrainer(
      lm, run.lens, run._config.train, run._config.objective, found,
      dict(run._config.mixture), run.params, tmp_path / "training",
      encoder.fingerprint)
    while trainer.step < steps:
      trainer.one_step()
    trainer._checkpoints.save(trainer.step, trainer.state, wait=True)
    trainer._checkpoints.close()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    whole, trainer.score_params)


def test_exported_weights_lead_a_history(finished, lm, encoder, tmp_path):
  path = tmp_path / "lens.safetensors"
  finished.export(path, {"config": {"x": 1}})
  policy = lensnet_policy.load_lensnet(lm, path, gistnet=encoder)
  assert policy.reads(encoder) and policy.card["windows"]["tales"] > 0
  found = finished.evaluate()
  assert {"tales/recall@8", "text/saved"} <= set(found)


def test_the_search_for_apart_prefers_other_places():
  rank = np.array([[3.0, 2.9, 1.0]] * 8)
  shadow = np.zeros((8, 3, 3), np.float32)
  shadow[:, 1, 0] = 1  # the second stands beside the first
  gold = np.array([[False, False, True]] * 8)
  apart = losses.fit_apart(rank, shadow, gold, counts=(2,))
  assert apart[0] > 1.9
  assert losses.recall(rank - shadow @ apart, gold, 2) == 1.0


@pytest.mark.parametrize("values, message", [
  (dict(windows=dict(passes=0)), "config.windows.passes"),
  (dict(train=dict(steps=0)), "config.train.steps"),
  (dict(objective=dict(rank=-1.0)), "config.objective.rank"),
  (dict(train=dict(stepz=3)), "stepz"),
])
def test_a_bad_setting_is_named(values, message):
  plain = dict(windows={"questions": ()}, objective={}, train={}, mixture={},
               lens={})
  for part, fields in values.items():
    plain[part] = {**plain[part], **fields}
  with pytest.raises(McjaxError, match=message):
    lens_run.read_config(plain)


def test_a_blend_lies_between_the_start_and_what_was_trained(
    finished, tmp_path, monkeypatch):
  trainer = finished._trainer
  monkeypatch.setattr(trainer, "config", dataclasses.replace(
    trainer.config, blend=0.25))
  half = trainer.export(tmp_path / "blend.safetensors", {})
  for name, new in trainer.score_params.items():
    jax.tree.map(
      lambda got, new, old: np.testing.assert_allclose(
        got, 0.25 * np.asarray(new) + 0.75 * np.asarray(old), atol=1e-6),
      half[name], new, trainer._start[name])
  with pytest.raises(McjaxError, match="blend"):
    LensTrainConfig(blend=0.0)


def test_a_missing_file_of_questions_is_named(lm, tmp_path):
  with pytest.raises(McjaxError, match="nothing.xz"):
    natural.read_questions(tmp_path / "nothing.xz", "train", lm.tokenizer)
