"""The launch scripts: what each of them starts."""

import os
import pathlib
import stat
import subprocess
import sys

import pytest

_LAUNCH = pathlib.Path(__file__).parents[2] / "tools/launch"
_ECHO = '#!/usr/bin/env bash\necho "$@" >> "$SAID"\nexit ${STATUS:-0}\n'


@pytest.fixture
def echo(tmp_path):
  """A folder of commands that only note how they were called."""
  for name in ("python", "srun", "scontrol", "gcloud"):
    path = tmp_path / name
    path.write_text(_ECHO)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return tmp_path


def _run(echo, script, *arguments, **environment):
  done = subprocess.run(
    [_LAUNCH / script, *arguments], check=False, env={
      **os.environ, "PATH": f"{echo}:{os.environ['PATH']}",
      "SAID": str(echo / "said"), **environment})
  return done.returncode, (echo / "said").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 75])
def test_local_numbers_the_processes_and_passes_their_status_on(echo, status):
  code, said = _run(echo, "local", "3", "-m", "main", STATUS=str(status))
  assert code == status
  assert sorted(line[-1] for line in said) == ["0", "1", "2"]
  assert all("-m main --distributed --coordinator=127.0.0.1:7401" in line
             for line in said)


@pytest.mark.parametrize("status, again", [(0, False), (75, True), (1, False)])
def test_slurm_queues_a_stopped_run_again(echo, status, again):
  code, said = _run(echo, "slurm", "--workdir=x", STATUS=str(status),
                    SLURM_JOB_ID="17")
  assert code == status
  assert said[0].endswith("train_gistnet --distributed --workdir=x")
  assert ("requeue 17" in said) == again


def test_a_task_of_an_array_asks_for_its_shard(echo, tmp_path):
  _, said = _run(echo, "slurm_sweep", "--workdir=x", SLURM_ARRAY_TASK_ID="3")
  assert said == ["-m experiments.sweep --shard=3/8 --workdir=x"]
  done = subprocess.run(  # one too many: the flags are read, nothing is run
    [_LAUNCH / "slurm_sweep", "--config=evaluate/visible:quick",
     "--grid=window=512,1024", f"--workdir={tmp_path / 'sweep'}"],
    cwd=_LAUNCH.parents[1], capture_output=True, text=True, check=False,
    env={**os.environ, "PYTHON": sys.executable, "SLURM_ARRAY_TASK_ID": "8"})
  assert done.returncode and "--shard=8/8: want i/n" in done.stderr


def test_a_pod_gets_the_command_on_every_host(echo):
  _, said = _run(echo, "tpu_pod", "--workdir=/mnt/r", TPU="t", ZONE="z")
  assert "--worker=all" in said[0] and said[0].rstrip().endswith(
    "train_gistnet --distributed --workdir=/mnt/r")
