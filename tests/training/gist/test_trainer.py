"""The training step and loop: golden step, frozen base, resume, signals."""

import dataclasses
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.gist import adapters
from mcjax.gist import encoder as gistnet
from mcjax.parallel import sharding
from mcjax.training.gist import trainer as gist_trainer
from mcjax.training.gist.losses import Objective
from mcjax.types import McjaxError

_OBJECTIVE = Objective(window=128, segment=32, rebuild=0.1, chunk=64)
_CONFIG = gist_trainer.TrainConfig(
  phases=(gist_trainer.Phase(3, _OBJECTIVE),
          gist_trainer.Phase(5, dataclasses.replace(_OBJECTIVE, rebuild=0.0))),
  batch=4, micro_batch=2, warmup=2, log_every=1, save_every=100,
  evaluate_every=100, validation_documents=2, mesh_data=1)


@pytest.fixture
def make(tiny_lm, tiny_gist_config, tiny_stores):
  """Builds trainers on one device."""

  def build(workdir, config=_CONFIG, devices=1, **kwargs):
    mesh = sharding.make_mesh(
      config.mesh_data, config.mesh_fsdp, config.mesh_tensor,
      jax.devices()[:devices])
    return gist_trainer.GistTrainer(
      tiny_lm, tiny_gist_config, config, tiny_stores, workdir, mesh=mesh,
      **kwargs)

  return build


def _losses(workdir):
  rows = [json.loads(line) for line in
          (workdir / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _noisy(config):
  """Parameters off the zero start, where every branch has a gradient."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda a: a + jnp.asarray(rng.normal(0, 0.1, a.shape).astype(np.float32)),
    gistnet.init_params(config))


def test_golden_step(make, tmp_path):
  """Values of the first two steps, recorded from this code."""
  trainer = make(tmp_path)
  found = [trainer.one_step() for _ in range(2)]
  recorded = pathlib.Path(__file__).with_name("golden_step.json")
  golden = json.loads(recorded.read_text())
  for values, expected in zip(found, golden, strict=True):
    assert values.keys() == expected.keys()
    for name, value in expected.items():
      assert values[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name


@pytest.mark.slow
def test_one_step_trains_everything_and_freezes_the_base(
    make, tmp_path, tiny_lm, tiny_gist_config):
  config = dataclasses.replace(_CONFIG, weight_decay=0.0)
  trainer = make(tmp_path, config, initial=_noisy(tiny_gist_config))
  before = jax.device_get(trainer.state["params"])
  frozen = jax.tree.map(np.array, tiny_lm.params)
  trainer.one_step()
  after = jax.device_get(trainer.state["params"])
  for path, leaf in jax.tree_util.tree_flatten_with_path(before)[0]:
    now = after
    for key in path:
      now = now[key.key]
    assert np.abs(now - leaf).max() > 0, jax.tree_util.keystr(path)
  jax.tree.map(np.testing.assert_array_equal, frozen, tiny_lm.params)


@pytest.mark.slow
def test_at_rate_zero_the_adapter_alone_is_trained(
    make, tmp_path, tiny_gist_config):
  config = dataclasses.replace(_CONFIG, learning_rate=0.0)
  trainer = make(tmp_path, config, initial=_noisy(tiny_gist_config))
  before = jax.device_get(trainer.state["params"])
  trainer.one_step()
  after = jax.device_get(trainer.state["params"])
  jax.tree.map(np.testing.assert_array_equal,
               adapters.without_adapter(before),
               adapters.without_adapter(after))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).min(),
                       before["adapter"], after["adapter"])
  assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_from_the_zero_start_everything_moves_within_three_steps(
    make, tmp_path):
  trainer = make(tmp_path, dataclasses.replace(_CONFIG, weight_decay=0.0))
  before = jax.device_get(trainer.state["params"])
  for _ in range(3):
    trainer.one_step()
  same = jax.tree.map(lambda a, b: bool(np.all(a == b)), before,
                      jax.device_get(trainer.state["params"]))
  assert not any(jax.tree.leaves(same)), same


@pytest.mark.slow
def test_step_compiles_once_per_phase(make, tmp_path):
  trainer = make(tmp_path)
  for _ in range(_CONFIG.steps):
    trainer.one_step()
  assert [f._cache_size() for f in trainer._steps.values()] == [1, 1]


@pytest.mark.parametrize("stop_after", [
  1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6))])
def test_killed_and_resumed_equals_uninterrupted(make, tmp_path, stop_after):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert make(whole).run()
  trainer = make(parts, dataclasses.replace(_CONFIG, save_every=1))
  for _ in range(stop_after):
    trainer.one_step()
  trainer._checkpoints.save(trainer.step, trainer.state, wait=True)
  resumed = make(parts)
  assert resumed.step == stop_after
  assert resumed.run()
  expected = _losses(whole)
  for step, loss in _losses(parts).items():
    assert loss == expected[step]
  assert max(_losses(parts)) == _CONFIG.steps


def test_sigterm_leaves_a_checkpoint(make, tmp_path):
  trainer = make(tmp_path)
  real = trainer.launch

  def launch():
    values = real()
    if trainer.step == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return values

  trainer.launch = launch
  assert not trainer.run()
  assert make(tmp_path).step == 2


@pytest.mark.slow
def test_metrics_after_the_checkpoint_are_dropped_on_resume(make, tmp_path):
  trainer = make(tmp_path)
  trainer.one_step()
  trainer._checkpoints.save(1, trainer.state, wait=True)
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n')
  make(tmp_path).run()
  steps = [json.loads(line)["step"] for line in
           (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert steps == list(range(1, _CONFIG.steps + 1))


def test_another_configuration_in_the_workdir_is_refused(make, tmp_path):
  trainer = make(tmp_path)
  trainer.one_step()
  trainer._checkpoints.save(1, trainer.state, wait=True)
  with pytest.raises(McjaxError, match="seed"):
    make(tmp_path, dataclasses.replace(_CONFIG, seed=5))


@pytest.mark.slow
def test_evaluation_keeps_the_best_weights(
    make, tmp_path, tiny_stores, tiny_lm, tiny_gist_config):
  trainer = make(tmp_path, dataclasses.replace(_CONFIG, evaluate_every=4))
  lines = []
  assert trainer.run(tiny_stores, report=lines.append)
  assert lines[0].startswith("compiling") and "a device" in lines[1]
  assert ["recovered" in line for line in lines[2:]] == [True, True]
  loaded = gistnet.load_gistnet(tiny_lm, tmp_path / "best.safetensors")
  assert loaded.card["steps"] in (4, 8)
  assert loaded.card["tokens"] == loaded.card["steps"] * 4 * 128


@pytest.mark.parametrize("data, fsdp, tensor", [
  (1, 2, 2), *(pytest.param(*m, marks=pytest.mark.slow)
               for m in ((4, 1, 1), (1, 4, 1), (1, 1, 4)))])
def test_any_mesh_gives_the_same_losses(make, tmp_path, data, fsdp, tensor):
  alone = make(tmp_path / "a", dataclasses.replace(_CONFIG, micro_batch=4))
  spread = make(tmp_path / "b", dataclasses.replace(
    _CONFIG, micro_batch=4, mesh_data=data, mesh_fsdp=fsdp,
    mesh_tensor=tensor), devices=4)
  for _ in range(2):
    one, many = alone.one_step(), spread.one_step()
    for name in ("loss", "kl", "gradient_norm"):
      assert many[name] == pytest.approx(one[name], rel=1e-5)


def _attending(name):
  turn = dataclasses.replace(_OBJECTIVE, attention=name)
  return dataclasses.replace(_CONFIG, phases=(gist_trainer.Phase(8, turn),))


@pytest.mark.slow
def test_attention_of_a_library_gives_the_same_losses(make, tmp_path):
  plain, fused = make(tmp_path / "a"), make(tmp_path / "b", _attending("xla"))
  for _ in range(2):
    one, other = plain.one_step(), fused.one_step()
    for name in ("loss", "kl", "gradient_norm"):
      assert other[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_attention_that_cannot_run_is_told_before_the_first_step(
    make, tmp_path, name):
  with pytest.raises(McjaxError, match=f"attention .*{name}"):
    make(tmp_path, _attending(name))


@pytest.mark.parametrize("field, value", [
  ("micro_batch", 3), ("batch", 0), ("decay_fraction", 0.0), ("phases", ())])
def test_configuration_errors_name_the_field(field, value):
  with pytest.raises(McjaxError, match=field):
    dataclasses.replace(_CONFIG, **{field: value})


def test_another_schedule_or_data_is_named_and_refused(
    make, tmp_path, tiny_stores):
  trainer = make(tmp_path)
  trainer.one_step()
  trainer._checkpoints.save(1, trainer.state, wait=True)
  other = dataclasses.replace(_CONFIG, learning_rate=0.5)
  with pytest.raises(McjaxError, match=r"schedule.learning_rate=0.001.*0.5"):
    make(tmp_path, other)
  with pytest.raises(McjaxError, match="data.mixture.code"):
    make(tmp_path, weights={"code": 2.0, "prose": 1.0})
  assert make(
    tmp_path, dataclasses.replace(other, accept_changes=True)).step == 1
  by_library = dataclasses.replace(_CONFIG, phases=tuple(
    gist_trainer.Phase(p.steps, *(dataclasses.replace(t, attention="xla")
                                  for t in p.turns)) for p in _CONFIG.phases))
  assert make(tmp_path, by_library).step == 1


def test_schedule_rises_stays_and_falls():
  config = dataclasses.replace(
    _CONFIG, phases=(gist_trainer.Phase(100, _OBJECTIVE),), warmup=10,
    decay_fraction=0.2, learning_rate=1.0)
  rate = gist_trainer.schedule(config)
  assert rate(0) == pytest.approx(0.1)
  assert rate(40) == pytest.approx(1.0) and rate(79) == pytest.approx(1.0)
  assert rate(99) < 0.1
