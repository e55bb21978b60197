"""Kills a training run at random moments; its curve must be that of a calm one.

  python tools/torture_training.py --kills=20 --folder=/tmp/kills

A tiny random base learns on loopback, in one to `--most` processes on meshes
drawn anew at every start. At a random moment after they came together one of
them gets SIGKILL or SIGTERM; the others must end by themselves with a
documented status, and the same command goes on. At the end every step's loss is
compared with an uninterrupted run of one device. Rounding differs between
meshes and grows as training goes on, kills or not: 100 steps stay below 1e-5.
"""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

from absl import app, flags
import numpy as np

from mcjax.parallel import processes
from mcjax.testing import tiny_models
from mcjax.training.common import data

_KILLS = flags.DEFINE_integer("kills", 20, "How many.", 1)
_FOLDER = flags.DEFINE_string("folder", None, "Of everything.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and meshes.")
_MOST = flags.DEFINE_integer("most", 2, "Processes of a start.", 1)
_STEPS = flags.DEFINE_integer("steps", 100, "Of the run.", 10)
_DEVICES = 4
_MESHES = (dict(mesh_data=4), dict(mesh_data=2, mesh_fsdp=2),
           dict(mesh_data=2, mesh_tensor=2), dict(mesh_data=1, mesh_tensor=4))
_DOCUMENTED = {0, -signal.SIGKILL, processes.STOPPED, processes.PEER_LOST}
_PATIENCE = 120  # seconds within which the others must have ended


def _prepare(folder: pathlib.Path) -> None:
  """A random Qwen3 and a store of random text."""
  config = tiny_models.CONFIGS["qwen3"]
  tiny_models.write_folder(folder / "lm", config, tiny_models.weights(config))
  rng = np.random.default_rng(1)
  data.write_kind(folder, "train", "own", [
    (str(i), rng.integers(0, 256, 700)) for i in range(4)], 256)


def _start(folder: pathlib.Path, workdir: str, mesh: dict, count: int,
           devices: int) -> list[subprocess.Popen]:
  settings = {
    **mesh, "batch": 4, "micro_batch": 4, "log_every": 1, "save_every": 5,
    "validation_documents": 0, "optimizer": "adamw"}
  command = [
    sys.executable, "-m", "experiments.train_gistnet",
    f"--config=gistnet_tiny:{_STEPS.value}", f"--workdir={folder / workdir}",
    f"--config.base={folder / 'lm'}", f"--config.data={folder}",
    "--config.objective.window=96", "--config.objective.segment=32",
    "--config.objective.chunk=64",
    *(f"--config.train.{k}={v}" for k, v in settings.items())]
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = {**os.environ, "XLA_FLAGS":
         f"--xla_force_host_platform_device_count={devices}"}
  many = [[]] if count == 1 else [
    ["--distributed", f"--coordinator=127.0.0.1:{port}",
     f"--num_processes={count}", f"--process_id={i}"] for i in range(count)]
  return [subprocess.Popen([*command, *own], env=env, text=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
          for own in many]


def _losses(workdir: pathlib.Path) -> dict[int, float]:
  path = workdir / "metrics.jsonl"
  rows = path.read_text().splitlines() if path.exists() else []
  return {r["step"]: r["loss"] for r in map(json.loads, rows)}


def _ends(members: list[subprocess.Popen], patience: float | None = None
          ) -> list[int]:
  """The statuses; raises where a process outlives the others for too long."""
  said = [m.communicate(timeout=patience)[1] for m in members]
  status = [m.returncode for m in members]
  if set(status) - _DOCUMENTED:
    raise SystemExit("\n".join([f"statuses {status}", *said]))
  return status


def _kill_one(folder: pathlib.Path, rng: random.Random) -> str:
  """Starts the run and kills a process of it at a random moment."""
  count = rng.randint(1, _MOST.value)
  devices = _DEVICES // count
  mesh = rng.choice(_MESHES)
  path, began = folder / "killed" / "metrics.jsonl", time.time()
  members = _start(folder, "killed", mesh, count, devices)
  # Once all have come together: those who wait for others wait for minutes.
  while all(m.poll() is None for m in members) and not (
      path.exists() and path.stat().st_mtime > began):
    time.sleep(0.02)
  wanted = len(_losses(folder / "killed")) + rng.randint(0, 5)
  while all(m.poll() is None for m in members) and (
      len(_losses(folder / "killed")) < wanted):
    time.sleep(0.02)
  time.sleep(rng.random() * 0.3)
  number, member = rng.choice(list(enumerate(members)))
  kind = rng.choice((signal.SIGKILL, signal.SIGTERM))
  member.send_signal(kind)
  told = time.monotonic()
  status = _ends(members, _PATIENCE)
  return (f"{kind.name} to {number + 1} of {count} on {mesh}, statuses "
          f"{status} after {time.monotonic() - told:.0f} s, step "
          f"{max(_losses(folder / 'killed'), default=0)}")


def main(argv) -> None:
  del argv
  folder, rng = pathlib.Path(_FOLDER.value), random.Random(_SEED.value)
  _prepare(folder)
  if any(_ends(_start(folder, "calm", dict(mesh_data=1), 1, 1))):
    raise SystemExit("the calm run failed")
  calm = _losses(folder / "calm")
  for number in range(_KILLS.value):
    print(f"{number + 1}: {_kill_one(folder, rng)}", flush=True)
  if any(_ends(_start(folder, "killed", dict(mesh_data=4), 1, _DEVICES))):
    raise SystemExit("the killed run does not go on")
  found = _losses(folder / "killed")
  if sorted(found) != sorted(calm):
    raise SystemExit(f"{len(found)} steps instead of {len(calm)}")
  worst = max(abs(found[s] / calm[s] - 1) for s in calm)
  print(f"{_KILLS.value} kills, {len(calm)} steps: losses differ by "
        f"{worst:.1e} at most, relative")
  if worst > 1e-5:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
