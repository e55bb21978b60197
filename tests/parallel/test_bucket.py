"""A run in Google Cloud Storage: real clients against an emulated server."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import pretrained
from mcjax.parallel import places
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.training.common.metrics import MetricWriter


@pytest.fixture(scope="module")
def bucket():
  """An empty bucket on loopback; what the clients need is in the environment.
  """
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  url = f"http://127.0.0.1:{port}"
  program = pathlib.Path(sys.executable).parent / "gcp-storage-emulator"
  server = subprocess.Popen(
    [program, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory",
     "--default-bucket=runs"],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  named = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url,
           "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
           "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in named.items():
      patch.setenv(name, value)
    until = time.monotonic() + 30
    while time.monotonic() < until:
      try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        break
      except OSError:
        time.sleep(0.05)
    yield "gs://runs"
  server.terminate()
  server.wait(30)


def test_everything_of_a_run_lies_in_a_bucket(bucket):
  folder = places.place(f"{bucket}/one")
  places.save_arrays(folder / "windows" / "a.npz", a=np.arange(3))
  assert places.load_arrays(folder / "windows" / "a.npz")["a"].sum() == 3
  for step in (1, 2):  # a run that goes on finds its rows
    writer = MetricWriter(folder, step - 1)
    writer.write(step, {"loss": 1.0 / step})
    writer.close()
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(r)["step"] for r in rows] == [1, 2]
  state = {"w": jnp.arange(4.0)}  # many at once are more than it stands
  checkpoints = Checkpoints(folder / "checkpoints", {"seed": 1})
  checkpoints.save(3, state, wait=True)
  checkpoints.close()
  again = Checkpoints(folder / "checkpoints", {"seed": 1})
  found = again.restore({k: jnp.zeros_like(v) for k, v in state.items()})
  again.close()
  np.testing.assert_array_equal(found["w"], state["w"])
  pretrained.save_weights(f"{bucket}/one/net.safetensors", "gistnet",
                          {"w": np.ones(3, np.float32)}, {}, {"a": 1})
  assert pretrained.read_weights(
    f"{bucket}/one/net.safetensors", "gistnet")[2] == {"a": 1}
  assert not os.path.exists("gs:")
