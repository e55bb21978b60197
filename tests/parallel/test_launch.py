"""The launch scripts: what each of them starts."""

import os
import pathlib
import stat
import subprocess

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


def test_a_pod_gets_the_command_on_every_host(echo):
  _, said = _run(echo, "tpu_pod", "--workdir=/mnt/r", TPU="t", ZONE="z")
  assert "--worker=all" in said[0] and said[0].rstrip().endswith(
    "train_gistnet --distributed --workdir=/mnt/r")
