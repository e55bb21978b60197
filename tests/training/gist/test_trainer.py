"""The training step and loop: golden step, frozen base, resume, signals."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.gist import adapters
from mcjax.gist import encoder as gistnet
from mcjax.gist import weights as gist_weights
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


@pytest.fixture(scope="module")
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


def _rows(workdir):
  return [json.loads(line) for line in
          (workdir / "metrics.jsonl").read_text().splitlines()]


def _losses(workdir):
  return {row["step"]: row["loss"] for row in _rows(workdir) if "loss" in row}


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
  """The folder of a run that nobody stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  assert make(workdir).run()
  return workdir


def _stopped(make, workdir, after, config=_CONFIG):
  """Runs until SIGTERM comes with so many steps."""
  trainer = make(workdir, config)
  real = trainer.launch

  def launch():
    values = real()
    if trainer.step == after:
      os.kill(os.getpid(), signal.SIGTERM)
    return values

  trainer.launch = launch
  assert not trainer.run()
  return workdir


@pytest.fixture(scope="module")
def stopped(make, tmp_path_factory):
  """The folder of a run that SIGTERM has stopped after its first step."""
  return _stopped(make, tmp_path_factory.mktemp("stopped"), 1)


@pytest.fixture
def folder(stopped, tmp_path):
  """A copy of it."""
  return shutil.copytree(stopped, tmp_path / "copy")


def _noisy(config):
  """Parameters off the zero start, where every branch has a gradient."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda a: a + jnp.asarray(rng.normal(0, 0.1, a.shape).astype(np.float32)),
    gist_weights.init_params(config))


def test_golden_step(whole):
  """Values of the first two steps, recorded from this code."""
  recorded = pathlib.Path(__file__).with_name("golden_step.json")
  golden = json.loads(recorded.read_text())
  for values, expected in zip(_rows(whole)[:2], golden, strict=True):
    assert set(values) >= set(expected)
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


def test_sigterm_leaves_a_checkpoint(make, folder):
  assert make(folder).step == 1


def _goes_on(make, whole, workdir):
  """A stopped run's losses are to be those of the whole one."""
  assert make(workdir).run()
  expected, found = _losses(whole), _losses(workdir)
  assert max(found) == _CONFIG.steps
  assert found == {step: expected[step] for step in found}


def test_stopped_and_resumed_equals_uninterrupted(make, whole, folder):
  _goes_on(make, whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 6])
def test_so_it_does_wherever_it_stops(make, whole, tmp_path, after):
  _goes_on(make, whole, _stopped(make, tmp_path / "run", after))


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(make, whole, tmp_path):
  trainer = make(tmp_path, dataclasses.replace(_CONFIG, save_every=1))
  for _ in range(3):  # nothing of it is closed
    trainer.one_step()
  trainer._checkpoints.save(trainer.step, trainer.state, wait=True)
  assert make(tmp_path).step == 3
  _goes_on(make, whole, tmp_path)


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


def test_another_configuration_in_the_workdir_is_refused(make, folder):
  with pytest.raises(McjaxError, match="seed"):
    make(folder, dataclasses.replace(_CONFIG, seed=5))


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


@pytest.mark.parametrize("micro_batch, mesh", [
  (2, (1, 2, 2)), *(pytest.param(4, mesh, marks=pytest.mark.slow)
                    for mesh in ((4, 1, 1), (1, 4, 1), (1, 1, 4)))])
def test_any_mesh_gives_the_same_losses(
    make, whole, tmp_path, micro_batch, mesh):
  data, fsdp, tensor = mesh
  spread = make(tmp_path, dataclasses.replace(
    _CONFIG, micro_batch=micro_batch, mesh_data=data, mesh_fsdp=fsdp,
    mesh_tensor=tensor), devices=4)
  for one in _rows(whole)[:2]:
    many = spread.one_step()
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


def test_another_schedule_or_data_is_named_and_refused(make, folder):
  other = dataclasses.replace(_CONFIG, learning_rate=0.5)
  with pytest.raises(McjaxError, match=r"schedule.learning_rate=0.001.*0.5"):
    make(folder, other)
  with pytest.raises(McjaxError, match="data.mixture.code"):
    make(folder, weights={"code": 2.0, "prose": 1.0})
  assert make(
    folder, dataclasses.replace(other, accept_changes=True)).step == 1
  by_library = dataclasses.replace(_CONFIG, phases=tuple(
    gist_trainer.Phase(p.steps, *(dataclasses.replace(t, attention="xla")
                                  for t in p.turns)) for p in _CONFIG.phases))
  assert make(folder, by_library).step == 1


def test_schedule_rises_stays_and_falls():
  config = dataclasses.replace(
    _CONFIG, phases=(gist_trainer.Phase(100, _OBJECTIVE),), warmup=10,
    decay_fraction=0.2, learning_rate=1.0)
  rate = gist_trainer.schedule(config)
  assert rate(0) == pytest.approx(0.1)
  assert rate(40) == pytest.approx(1.0) and rate(79) == pytest.approx(1.0)
  assert rate(99) < 0.1
