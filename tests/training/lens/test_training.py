"""LensNet's labels, losses, trainer and rounds, on the tiny base."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mcjax.evaluation.data import planted
from mcjax.lens import features as lens_rows
from mcjax.lens import network as lensnet
from mcjax.lens.features import BURIED, RAW
from mcjax.parallel import sharding
from mcjax.testing import tiny_base
from mcjax.training.common.data import TokenStore
from mcjax.training.lens import distil as lens_distil
from mcjax.training.lens import labels as focus_labels
from mcjax.training.lens import losses as lens_losses
from mcjax.training.lens import rounds as lens_rounds
from mcjax.training.lens import tasks as focus_tasks
from mcjax.training.lens import trainer as lens_trainer
from mcjax.training.lens.trainer import LensTrainConfig, LensTrainer
from mcjax.types import McjaxError
from mcjax.window import counterfactual

_LABELS = focus_labels.LabelConfig(
  window=512, windows=2, gap=1, raw=3, found=2, chance=2, together=4)
_LENS = lensnet.LensNetConfig(
  d_model=32, width=16, heads=2, layers=1, feature_width=8, key_dim=16)
_TRAIN = LensTrainConfig(
  steps=6, batch=3, pairs=4, warmup=2, log_every=1, evaluate_every=3,
  save_every=2)


@pytest.fixture(scope="module")
def lm():
  return tiny_base.make_lm(max_positions=1024)


@pytest.fixture(scope="module")
def encoder(lm):
  return tiny_base.gistnet(lm, spread=0.05)


@pytest.fixture(scope="module")
def stores(lm):
  ids = [lm.tokenizer.encode(tiny_base.text(6000, seed)) for seed in range(4)]
  offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
  names = tuple("abcd")
  return {"prose": TokenStore(np.concatenate(ids), offsets, names)}


@pytest.fixture(scope="module")
def tasks(lm, stores):
  return focus_tasks.TaskSource(stores, lm.tokenizer, longest=3000)


@pytest.fixture(scope="module")
def labelled(lm, encoder, tasks):
  labeller = focus_labels.Labeller(lm, encoder, _LABELS)
  return {n: labeller.label(tasks.task(n), n) for n in (0, 1, 3)}


@pytest.fixture(scope="module")
def windows(labelled):
  return [w for group in labelled.values() for w in group]


# --- Tasks -------------------------------------------------------------------


def test_tasks_are_reproducible_and_of_every_kind(tasks):
  kinds = [tasks.task(n).kind for n in range(6)]
  assert set(kinds) >= {"ask", "return", "follow"}
  a, b = tasks.task(4), tasks.task(4)
  np.testing.assert_array_equal(a.ids, b.ids)
  assert dataclasses.replace(a, ids=None) == dataclasses.replace(b, ids=None)
  assert not np.array_equal(tasks.task(2).ids[:50], a.ids[:50])


def test_the_asked_fact_is_where_the_task_says(tasks, lm):
  for number in (0, 2, 4):
    task = tasks.task(number)
    start, stop = task.place
    assert lm.tokenizer.decode(
      task.ids[start:stop].tolist()).strip() == task.answer
    assert task.question and task.question not in task.answer


def test_training_asks_otherwise_than_the_evaluation():
  def bare(text: str) -> set[str]:
    return {w for w in text.lower().split() if "{" not in w}

  theirs = [bare(t[1]) for t in planted._TEMPLATES]
  for _, question, _ in focus_tasks._FACTS:
    assert all(len(bare(question) & t) <= 5 for t in theirs)
    assert question not in [t[1] for t in planted._TEMPLATES]


def test_resumed_finds_a_phrase_that_was_long_absent():
  rng = np.random.default_rng(0)
  ids = rng.permutation(200_000)[:6000].astype(np.int32)
  ids[4000:4003] = ids[1500:1503]
  ids[4500:4503] = ids[4400:4403]  # not absent long enough
  np.testing.assert_array_equal(focus_tasks.resumed(ids), [4000])


# --- Labels ------------------------------------------------------------------


@pytest.mark.slow
def test_windows_hold_rows_of_every_state_and_labels(labelled):
  for number, group in labelled.items():
    assert len(group) == 3 if number == 0 else len(group) in (2, 4)
    for w in group:
      known = np.isfinite(w.worth)
      assert known.sum() >= 3
      raw = w.state == RAW
      assert np.isfinite(w.cheap[raw]).all()
      assert np.isnan(w.cheap[~raw]).all()
      assert not (known & w.pinned).any()
      assert (w.ids[:, lens_rows.MARGIN : -lens_rows.MARGIN] >= 0).all()
  assert any(w.answers.any() for w in labelled[0])
  states = np.concatenate([w.state for g in labelled.values() for w in g])
  assert set(states) >= {RAW, BURIED}


def test_a_label_is_what_the_edit_would_change(lm, encoder, tasks):
  """Worth of a raw block: collapsed in earnest, the NLL rises by as much."""
  labeller = focus_labels.Labeller(lm, encoder, _LABELS)
  task = tasks.task(1)
  loop, tree = labeller._loop(task, task.starts[0], 1)
  loop.cold_start(256)
  loop.follow()
  loop.sync()
  ahead = task.ids[task.starts[0] : task.starts[0] + 32]
  window = loop.context.window
  rows = lens_rows.window_rows(window, [])
  pick = int(rows.entry[np.flatnonzero(rows.state == RAW)[2]])
  base, losses = counterfactual.edit_losses(
    loop.context, tree, [counterfactual.Candidate(-1, pick)], ahead)
  window.collapse(pick, 0)
  loop.context.load_unready(tree)
  loop.append(ahead)
  loop.sync(renew=33)
  real = loop.context.newest_nll(ahead).mean()
  assert losses[0] == pytest.approx(real, abs=1e-4)
  assert abs(losses[0] - base) > 1e-6
  tree.close()


@pytest.mark.slow
def test_a_buried_block_is_labelled_as_if_it_were_raw(lm, encoder, tasks):
  """Block, newest token and continuation alone, by the plain decoder."""
  labeller = focus_labels.Labeller(lm, encoder, _LABELS)
  ids = lm.tokenizer.encode(tiny_base.text(2100, 7))
  task = dataclasses.replace(tasks.task(1), ids=ids)
  loop, tree = labeller._loop(task, 2049, 1)
  window = loop.context.window
  window.retile([(2, 0), (2, 1), (0, 2048)])
  loop.sync()
  ahead = ids[2049:2081]
  candidate = counterfactual.Candidate(1, 1, 40)
  _, losses = counterfactual.edit_losses(loop.context, tree, [candidate], ahead)
  seen = np.concatenate([ids[1280:1312], ids[2048:2081]])
  positions = np.arange(2, 2 + len(seen))  # behind two hidden gists
  logits = tiny_base.plain_logits(
    lm, np.asarray(lm.params["embed"])[seen], positions)
  nll = -tiny_base.log_softmax(logits)[np.arange(32, 64), ahead]
  assert losses[0] == pytest.approx(nll.mean(), abs=1e-4)
  tree.close()


@pytest.mark.slow
def test_the_cheap_estimate_agrees_for_a_small_change(lm, encoder, tasks):
  """The gradient is that of the loss for less of an entry's value."""
  labeller = focus_labels.Labeller(lm, encoder, _LABELS)
  task = tasks.task(1)
  loop, tree = labeller._loop(task, task.starts[0], 1)
  loop.cold_start(256)
  loop.sync()
  ahead = task.ids[task.starts[0] : task.starts[0] + 32]
  slopes = counterfactual.slot_gradients(loop.context, tree, ahead)
  e = loop.context.window.entries
  at = int(np.argmax(np.abs(slopes[:-1])))
  before, _ = counterfactual.edit_losses(loop.context, tree, [], ahead)
  state = loop.context.state
  step = np.float32(0.05)
  loop.context.state = state._replace(
    values=state.values.at[:, :, e.slot[at]].multiply(1 - step))
  after, _ = counterfactual.edit_losses(loop.context, tree, [], ahead)
  assert (after - before) / step == pytest.approx(slopes[at], rel=0.15)
  tree.close()


@pytest.mark.slow
def test_labels_are_kept_and_not_made_again(lm, encoder, tasks, tmp_path):
  class Counted(focus_labels.Labeller):
    made = 0

    def label(self, task, number):
      Counted.made += 1
      return super().label(task, number)

  labeller = Counted(lm, encoder, _LABELS)
  assert list(focus_labels.make(tmp_path, labeller, tasks, 1, 3)) == [1]
  first = dict(focus_labels.read_tasks(tmp_path, 1, 3))
  assert list(focus_labels.make(tmp_path, labeller, tasks, 1, 3)) == []
  assert Counted.made == 1
  again = dict(focus_labels.read_tasks(tmp_path, 1, 3))
  assert first[3]
  for a, b in zip(first[3], again[3], strict=True):
    for field in dataclasses.fields(a):
      np.testing.assert_array_equal(
        getattr(a, field.name), getattr(b, field.name))


# --- Losses ------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(lm, encoder, windows):
  embed = np.asarray(lm.params["embed"])
  host = lm.tokenizer.encode(tiny_base.text(4000, 9))
  pairs = lens_losses.draw_pairs(
    8, 8, lm.tokenizer, host, focus_tasks.draw_fact, 0)
  return embed, lens_losses.stack(windows, embed, encoder), pairs


@pytest.mark.slow
def test_stacked_windows_hold_the_gists_of_their_blocks(
    batch, windows, encoder):
  _, stacked, _ = batch
  w = windows[0]
  centre = w.ids[:, lens_rows.MARGIN : -lens_rows.MARGIN]
  np.testing.assert_allclose(
    stacked.inputs.gists[0, : len(w.state)], encoder.encode_tokens(centre),
    rtol=1e-5, atol=1e-6)
  assert not stacked.inputs.mask[0, len(w.state) :].any()


@pytest.mark.slow
def test_the_loss_falls_when_scores_follow_the_labels(batch, monkeypatch):
  embed, stacked, pairs = batch
  inputs = stacked.inputs._replace(distance=np.nan_to_num(stacked.worth))
  stacked = stacked._replace(inputs=inputs)
  params = lensnet.init_params(_LENS)

  def terms(direction):
    monkeypatch.setattr(
      lensnet, "logits", lambda p, c, x, m: direction * 10.0 * x.distance)
    return lens_losses.loss(
      params, _LENS, lens_losses.LensObjective(cheap=0.0), embed, stacked,
      pairs)[1]

  right, wrong = terms(1.0), terms(-1.0)
  assert right["regression"] == pytest.approx(0.0, abs=1e-9)
  assert wrong["regression"] > 1e-6
  assert right["ranking"] <= wrong["ranking"]


@pytest.mark.slow
def test_every_parameter_learns_and_the_base_is_frozen(batch, lm):
  embed, stacked, pairs = batch
  rng = np.random.RandomState(0)
  params = jax.tree.map(
    lambda a: a + np.float32(0.1) * rng.standard_normal(a.shape).astype(
      np.float32), lensnet.init_params(_LENS))
  gradient = jax.grad(lambda p: lens_losses.loss(
    p, _LENS, lens_losses.LensObjective(), embed, stacked, pairs)[0])(params)
  for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# --- Trainer -----------------------------------------------------------------


def _mesh():
  return sharding.make_mesh(1, devices=jax.devices()[:1])


def _losses(folder):
  rows = [json.loads(line) for line in
          (folder / "metrics.jsonl").read_text().splitlines()]
  return {r["step"]: r["loss"] for r in rows if "loss" in r}


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_losses(
    lm, encoder, windows, batch, tmp_path):
  def make(folder):
    return LensTrainer(lm, encoder, _LENS, _TRAIN, lens_losses.LensObjective(),
                       windows, batch[2], folder, mesh=_mesh())

  whole = make(tmp_path / "whole")
  assert whole.run(windows, report=lambda _: None)
  cut = make(tmp_path / "cut")
  for _ in range(4):
    cut.one_step()
  cut._checkpoints.save(4, cut.state, wait=True)
  cut._checkpoints.close()
  resumed = make(tmp_path / "cut")
  assert resumed.step == 4
  resumed.run(report=lambda _: None)
  a, b = _losses(tmp_path / "whole"), _losses(tmp_path / "cut")
  for step in (5, 6):
    assert b[step] == pytest.approx(a[step], rel=1e-5)
  best = json.loads((tmp_path / "whole" / "best.json").read_text())
  assert best["step"] in (3, 6)


@pytest.mark.slow
def test_evaluation_by_hand(batch, monkeypatch):
  """Perfect scores have no regret, and none at all has all of it."""
  embed, stacked, _ = batch
  worth = np.nan_to_num(stacked.worth)
  monkeypatch.setattr(lens_trainer, "window_scores",
                      lambda *a: np.sign(worth) * 0.5 + worth)
  got = lens_trainer.evaluate(None, _LENS, embed, stacked)
  assert got["spearman"] == pytest.approx(1.0)
  assert got["regret"] == pytest.approx(0.0, abs=1e-6)
  monkeypatch.setattr(
    lens_trainer, "window_scores", lambda *a: np.zeros_like(worth))
  got = lens_trainer.evaluate(None, _LENS, embed, stacked)
  assert got["regret"] == 1.0 and got["spearman"] == 0.0


@pytest.mark.slow
def test_rounds_label_with_the_policy_they_trained(
    lm, encoder, stores, tmp_path):
  config = lens_rounds.read_config({
    "rounds": [{"tasks": 2, "steps": 2}, {"tasks": 1, "steps": 2}],
    "labels": dataclasses.asdict(_LABELS), "objective": {},
    "train": {**dataclasses.asdict(_TRAIN)}, "longest": 2600, "pairs": 8,
    "validation_every": 2,
    "lens": {"width": 16, "heads": 2, "layers": 1, "key_dim": 16}})
  rounds = lens_rounds.LensRounds(
    lm, encoder, config, stores, tmp_path, mesh=_mesh())
  assert rounds.run()
  assert len(list((tmp_path / "labels-1").glob("*.npz"))) == 1
  assert (tmp_path / "round-1" / "best.json").exists()
  rounds.export(tmp_path / "out.safetensors", {"note": 1})
  params, lens = lens_rounds.load_params(tmp_path / "out.safetensors")
  assert lens.width == 16 and set(params) == {"score", "keys"}


def test_mistakes_in_the_settings_are_named():
  good = {"rounds": [{"tasks": 1, "steps": 1}], "labels": {}, "objective": {},
          "train": {}, "lens": {}, "longest": 4096, "pairs": 8,
          "validation_every": 7}
  lens_rounds.read_config(good)
  for change, named in (({"lens": {"depth": 1}}, "config.lens.depth"),
                        ({"train": {"steps": 0}}, "config.train.steps"),
                        ({"rounds": []}, "config.rounds")):
    with pytest.raises(McjaxError, match=named):
      lens_rounds.read_config({**good, **change})


# --- Another GistNet ---------------------------------------------------------


def test_a_lensnet_learns_its_old_scores_from_another_gistnets_gists(
    lm, encoder, tasks):
  other = tiny_base.gistnet(lm, seed=5, spread=0.05)
  config = dataclasses.replace(_LABELS, windows=1)
  seen = list(lens_distil.observe(lm, encoder, other, tasks, 3, config))
  assert len(seen) >= 3
  for old, new in seen:
    count = int(old.mask.sum())
    blocks = np.maximum(old.ids[:count, lens_rows.MARGIN:-lens_rows.MARGIN], 0)
    for inputs, gistnet in ((old, encoder), (new, other)):
      np.testing.assert_allclose(
        inputs.gists[:count], gistnet.encode_tokens(blocks), 1e-2, 1e-2)
    np.testing.assert_array_equal(old.ids, new.ids)
    assert np.abs(old.tail - new.tail).max() > 1e-3
  teacher = lensnet.init_params(_LENS, 1)
  teacher["score"]["score"]["kernel"] = np.random.default_rng(0).normal(
    0, 1, teacher["score"]["score"]["kernel"].shape).astype(np.float32)
  student, missed = lens_distil.distil(
    teacher, teacher, _LENS, lm.params["embed"], seen, 40, 3, 3e-3)
  assert missed["after"] < missed["before"]
  assert student["keys"] is teacher["keys"]
