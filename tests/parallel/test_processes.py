"""Real processes on loopback train as one device does, and stop as one."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mcjax.base.load import load_base_lm
from mcjax.gist import weights as gist_weights
from mcjax.parallel import processes, sharding
from mcjax.testing import tiny_models
from mcjax.training.common import data
from mcjax.training.gist import trainer as gist_trainer

_ROOT = pathlib.Path(__file__).parents[2]
_STEPS = 200
_TRAIN = dict(batch=4, micro_batch=4, log_every=1, save_every=1000,
              validation_documents=0, warmup=2, learning_rate=1e-3,
              optimizer="adamw", decay_fraction=1.0)
_OBJECTIVE = dict(window=96, segment=32, chunk=64)
_LENS = dict(batch=4, steps=8, warmup=2, log_every=1, save_every=1000,
             evaluate_every=1000)
_SETTINGS = {"gistnet": """
from experiments.configs import gistnet

def get_config():
  c = gistnet.get_config()
  c.base, c.dtype, c.data = {lm!r}, "float32", {data!r}
  c.phases = [dict(steps={steps}, turns=[{{}}])]
  c.objective.update({objective})
  c.train.update({train})
  return c
""", "lensnet": """
from experiments.configs import lensnet_tiny

def get_config():
  c = lensnet_tiny.get_config()
  c.base, c.data = {lm!r}, {data!r}
  c.windows.update(facts=2, cloze=0, code=0, reworded=0, listed=0, text=1,
                    length=2048)
  c.train.update({lens})
  return c
""", "alternate": """
from experiments.configs import alternate_tiny

def get_config():
  c = alternate_tiny.get_config(2)
  c.base, c.data, c.cycles = {lm!r}, {data!r}, 1
  c.gist.mixture = {{}}
  c.gist.phases = [dict(steps=3, turns=[{{}}])]
  c.gist.objective.update({objective})
  c.gist.train.update({train})
  c.lens.windows.update(facts=2, cloze=0, code=0, text=1, length=2048)
  c.lens.train.update({lens})
  return c
"""}
_MAINS = {"gistnet": "train_gistnet", "lensnet": "train_lensnet"}
_ALONE: list[float] = []  # losses of one device, as far as they were needed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A random Qwen3 folder with a text store beside it."""
  folder = tmp_path_factory.mktemp("base")
  config = tiny_models.CONFIGS["qwen3"]
  tiny_models.write_folder(folder / "lm", config, tiny_models.weights(config))
  rng = np.random.default_rng(1)
  for split in ("train", "validation"):
    data.write_kind(folder, split, "own", [
      (str(i), rng.integers(0, 256, 700)) for i in range(4)], 256)
  return folder


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def _start(base, workdir, mesh, count=2, devices=2, program="gistnet"):
  """The documented command, once a process."""
  port = _free_port()
  settings = base / f"{workdir.name}.py"
  settings.write_text(_SETTINGS[program].format(
    lm=str(base / "lm"), data=str(base), steps=_STEPS, objective=_OBJECTIVE,
    train=_TRAIN | mesh, lens=_LENS | mesh))
  command = [
    sys.executable, "-m", f"experiments.{_MAINS.get(program, program)}",
    f"--workdir={workdir}", f"--config={settings}", "--distributed",
    f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
  flags = " ".join([
    f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f
  ] + [f"--xla_force_host_platform_device_count={devices}"])
  return [
    subprocess.Popen(
      [*command, f"--process_id={i}"], cwd=_ROOT, stderr=subprocess.PIPE,
      env={**os.environ, "XLA_FLAGS": flags}, text=True)
    for i in range(count)]


def _losses(workdir) -> dict[int, float]:
  path = workdir / "metrics.jsonl"
  rows = path.read_text().splitlines() if path.exists() else []
  return {r["step"]: r["loss"] for r in map(json.loads, rows) if "loss" in r}


def _wait_for_steps(members, workdir, steps: int) -> None:
  until = time.monotonic() + 600
  while len(_losses(workdir)) < steps and time.monotonic() < until:
    if any(m.poll() is not None for m in members):
      for m in members:
        m.kill()
      pytest.fail(str(_ends(members)))
    time.sleep(0.1)


def _ends(members) -> tuple[list[int], list[str]]:
  """Exit statuses and what was said on the way."""
  said = [m.communicate(timeout=600)[1] for m in members]
  return [m.returncode for m in members], said


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
  """A trainer on one device, which has not begun."""
  c = gist_trainer.read_config(
    _TRAIN, _OBJECTIVE, [dict(steps=_STEPS, turns=[{}])])
  lm = load_base_lm(base / "lm")
  return gist_trainer.GistTrainer(
    lm, gist_weights.default_config(lm.params, lm.config), c,
    data.open_split(base, "train"), tmp_path_factory.mktemp("alone"),
    {"own": 1.0}, mesh=sharding.make_mesh(1, devices=jax.devices()[:1]))


_FOUR = [dict(mesh_data=4), dict(mesh_data=2, mesh_tensor=2),
         dict(mesh_data=2, mesh_fsdp=2), dict(mesh_data=1, mesh_fsdp=4)]
_TENSOR = dict(mesh_data=1, mesh_tensor=4)


@pytest.mark.parametrize("mesh, count", [
  (_TENSOR, 2),
  *(pytest.param(m, 2, marks=pytest.mark.slow) for m in _FOUR),
  *(pytest.param(m, 4, marks=pytest.mark.slow) for m in (*_FOUR, _TENSOR))])
def test_processes_learn_and_stop_as_one(base, tmp_path, alone, mesh, count):
  """SIGTERM to one; on any mesh the losses are those of one device."""
  members = _start(base, tmp_path, mesh, count, 4 // count)
  _wait_for_steps(members, tmp_path, 5)
  began = time.monotonic()
  members[1].send_signal(signal.SIGTERM)
  status, said = _ends(members)
  assert status == [processes.STOPPED] * count, said
  assert time.monotonic() - began < 60
  found = _losses(tmp_path)
  saved = {int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")}
  assert saved == {max(found)} and max(found) < _STEPS
  _same_as_alone(found, alone)


def _same_as_alone(found: dict[int, float], alone) -> None:
  while len(_ALONE) < max(found):
    _ALONE.append(alone.one_step()["loss"])
  for step, loss in found.items():
    assert loss == pytest.approx(_ALONE[step - 1], rel=1e-5), step


@pytest.mark.slow
def test_another_mesh_and_number_of_processes_goes_on(base, tmp_path, alone):
  """Stopped at 4 × 1, then at 2 × 2 (fsdp), at last one process."""
  for mesh, count, steps in ((dict(mesh_data=4), 4, 4),
                             (dict(mesh_data=1, mesh_fsdp=4), 2, 8),
                             (dict(mesh_data=2, mesh_tensor=2), 1, 12)):
    members = _start(base, tmp_path, mesh, count, 4 // count)
    _wait_for_steps(members, tmp_path, steps)
    members[0].send_signal(signal.SIGTERM)
    status, said = _ends(members)
    assert status == [processes.STOPPED] * count, said
  found = _losses(tmp_path)
  assert sorted(found) == list(range(1, max(found) + 1))
  _same_as_alone(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, count", [
  (dict(mesh_data=4), 2), (dict(mesh_data=4), 4),
  (dict(mesh_data=2, mesh_fsdp=2), 4), (dict(mesh_data=1, mesh_fsdp=4), 4)])
def test_processes_share_windows_and_teach_one_lensnet(
    base, tmp_path, lens_alone, mesh, count):
  """All make windows, a history each; the losses are those of one device."""
  files, expected = lens_alone
  members = _start(base, tmp_path, mesh, count, 4 // count, "lensnet")
  status, said = _ends(members)
  assert status == [0] * count, said
  made = sorted((tmp_path / "windows").rglob("*.npz"))
  assert [p.relative_to(tmp_path) for p in made] == sorted(files)
  for path in made:
    wanted = files[path.relative_to(tmp_path)]
    for name, values in np.load(path).items():
      np.testing.assert_array_equal(values, wanted[name], err_msg=name)
  found = _losses(tmp_path / "training")
  assert sorted(found) == list(range(1, _LENS["steps"] + 1))
  for step, loss in found.items():
    assert loss == pytest.approx(expected[step], rel=1e-5), step


@pytest.fixture(scope="module")
def lens_alone(base, tmp_path_factory):
  """Windows {path: arrays} and losses {step: loss} of one device."""
  folder = tmp_path_factory.mktemp("lens-alone")
  status, said = _ends(_start(
    base, folder, dict(mesh_data=1), 1, 1, "lensnet"))
  assert status == [0], said
  files = {p.relative_to(folder): dict(np.load(p))
           for p in (folder / "windows").rglob("*.npz")}
  return files, _losses(folder / "training")


@pytest.mark.slow
def test_processes_alternate_as_one_does(base, tmp_path):
  """Both networks, one cycle: the losses and the report of one process."""
  folders = tmp_path / "one", tmp_path / "two"
  for count, folder in enumerate(folders, 1):
    members = _start(
      base, folder, dict(mesh_data=count), count, 1, "alternate")
    status, said = _ends(members)
    assert status == [0] * count, said
  for part in ("gistnet", "lensnet/training"):
    one, two = (_losses(f / "cycle-0" / part) for f in folders)
    assert one and one.keys() == two.keys()
    for step, loss in two.items():
      assert loss == pytest.approx(one[step], rel=1e-5), (part, step)
  one, two = (json.loads((f / "results.json").read_text()) for f in folders)
  assert one["cycles"][0].keys() == two["cycles"][0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_by_the_others(base, tmp_path, lost):
  members = _start(base, tmp_path, dict(mesh_data=1, mesh_tensor=4))
  _wait_for_steps(members, tmp_path, 2)
  began = time.monotonic()
  members[lost].kill()
  status, said = _ends(members)
  assert time.monotonic() - began < 120
  assert status[1 - lost] == processes.PEER_LOST
  assert f"error: process {lost}" in said[1 - lost]
