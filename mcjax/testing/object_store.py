"""An S3-compatible server on loopback, for tests: moto in its own process."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from mcjax.types import McjaxError

BUCKET = "bucket"
_PATIENCE = 120.0  # seconds for the server to start


@contextlib.contextmanager
def serve() -> Iterator[dict[str, str]]:
  """Runs a server with an empty bucket.

  Yields:
    The environment with which `s3://bucket/...` is a place there.

  Raises:
    McjaxError: it does not start, for instance since moto is not installed.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  code = (f"from moto.server import main; main(['-H', '127.0.0.1', '-p',"
          f" '{port}'])")
  silent = subprocess.DEVNULL
  server = subprocess.Popen(
    [sys.executable, "-c", code], stdout=silent, stderr=silent)
  try:
    endpoint = f"http://127.0.0.1:{port}"
    _make_bucket(endpoint, server)
    yield {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "nobody",
           "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_REGION": "us-east-1"}
  finally:
    server.kill()
    server.wait()


def _make_bucket(endpoint: str, server: subprocess.Popen) -> None:
  request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  end = time.monotonic() + _PATIENCE
  while time.monotonic() < end and server.poll() is None:
    try:
      opener.open(request, timeout=5).close()
      return
    except (urllib.error.URLError, OSError):
      time.sleep(0.05)
  server.kill()
  raise McjaxError("moto's server does not start: pip install mcjax[test]")
