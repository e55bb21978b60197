"""Two real processes on loopback train as one device does, and stop as one."""

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
from mcjax.gist import encoder as gistnet
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
_ALONE: list[float] = []  # losses of one device, as far as they were needed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A random Qwen3 folder with a text store beside it."""
  folder = tmp_path_factory.mktemp("base")
  config = tiny_models.CONFIGS["qwen3"]
  tiny_models.write_folder(folder / "lm", config, tiny_models.weights(config))
  rng = np.random.default_rng(1)
  data.write_kind(folder, "train", "own", [
    (str(i), rng.integers(0, 256, 700)) for i in range(4)], 256)
  return folder


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def _start(base, workdir, mesh, count=2, devices=2):
  """The documented command, once a process."""
  port = _free_port()
  settings = base / f"{workdir.name}.py"
  settings.write_text(f"""
from experiments.configs import gistnet

def get_config():
  c = gistnet.get_config()
  c.base, c.dtype, c.data = {str(base / "lm")!r}, "float32", {str(base)!r}
  c.mixture = dict(own=1.0)
  c.phases = [dict(steps={_STEPS}, turns=[{{}}])]
  c.objective.update({_OBJECTIVE})
  c.train.update({_TRAIN | mesh})
  return c
""")
  command = [
    sys.executable, "-m", "experiments.train_gistnet", f"--workdir={workdir}",
    f"--config={settings}", "--distributed",
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
  return {r["step"]: r["loss"] for r in map(json.loads, rows)}


def _wait_for_steps(members, workdir, steps: int) -> None:
  until = time.monotonic() + 120
  while len(_losses(workdir)) < steps and time.monotonic() < until:
    if any(m.poll() is not None for m in members):
      for m in members:
        m.kill()
      pytest.fail(str(_ends(members)))
    time.sleep(0.1)


def _ends(members) -> tuple[list[int], list[str]]:
  """Exit statuses and what was said on the way."""
  said = [m.communicate(timeout=120)[1] for m in members]
  return [m.returncode for m in members], said


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
  """A trainer on one device, which has not begun."""
  c = gist_trainer.read_config(
    _TRAIN, _OBJECTIVE, [dict(steps=_STEPS, turns=[{}])])
  lm = load_base_lm(base / "lm")
  return gist_trainer.GistTrainer(
    lm, gistnet.default_config(lm.params, lm.config), c,
    data.open_split(base, "train"), tmp_path_factory.mktemp("alone"),
    {"own": 1.0}, mesh=sharding.make_mesh(1, devices=jax.devices()[:1]))


@pytest.mark.parametrize("mesh", [
  dict(mesh_data=1, mesh_tensor=4),
  *(pytest.param(m, marks=pytest.mark.slow) for m in (
    dict(mesh_data=4), dict(mesh_data=2, mesh_fsdp=2),
    dict(mesh_data=2, mesh_tensor=2), dict(mesh_data=1, mesh_fsdp=4)))])
def test_two_processes_learn_and_stop_as_one(base, tmp_path, alone, mesh):
  """SIGTERM to either; on any mesh the losses are those of one device."""
  members = _start(base, tmp_path, mesh)
  _wait_for_steps(members, tmp_path, 5)
  began = time.monotonic()
  members[1].send_signal(signal.SIGTERM)
  status, said = _ends(members)
  assert status == [processes.STOPPED] * 2, said
  assert time.monotonic() - began < 60
  found = _losses(tmp_path)
  saved = {int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")}
  assert saved == {max(found)} and max(found) < _STEPS
  expected = _ALONE
  while len(expected) < len(found):
    expected.append(alone.one_step()["loss"])
  for step, loss in found.items():
    assert loss == pytest.approx(expected[step - 1], rel=1e-5), step





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
