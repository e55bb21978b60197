"""Runs the server until it is told to stop; commits everything then."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import os
import signal
import sys
from typing import TYPE_CHECKING

from mcjax.base.load import load_base_lm
from mcjax.config import Config
from mcjax.gist.encoder import load_gistnet
from mcjax.lens.policy import load_lensnet
from mcjax.parallel import sharding
from mcjax.runtime.engine import Engine
from mcjax.settings import read_fields
from mcjax.types import McjaxError
from mcjax.window import spread

if TYPE_CHECKING:
  import uvicorn

  from mcjax.serve.app import Server

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(config) -> None:
  """Serves; returns once a signal has stopped it and all is committed.

  Args:
    config: ConfigDict with base, dtype, gistnet, lensnet, host, port, root,
      slots, splices, mesh_data, mesh_fsdp, mesh_tensor, limits, loop.

  Raises:
    McjaxError: a setting is wrong, or the extra "serve" is not installed.
  """
  try:
    import uvicorn

    from mcjax.serve.app import Server
    from mcjax.serve.guard import Limits
    from mcjax.serve.histories import Histories
  except ImportError as error:
    raise McjaxError(
      f"{error.name} is not installed: pip install 'mcjax[serve]'") from None
  limits = read_fields(Limits, "limits", config.limits.to_dict())
  loop = read_fields(Config, "loop", config.loop.to_dict())
  key = os.environ.get("MCJAX_API_KEY", "")
  if config.host not in ("127.0.0.1", "localhost", "::1") and not key:
    raise McjaxError(
      f"config.host {config.host} is open to others: set MCJAX_API_KEY")
  lm = load_base_lm(config.base, dtype=config.dtype, mesh=_mesh(config))
  near = spread.at_home(lm, spread.spread_of(lm, None, sharding.RULES))
  gistnet = load_gistnet(near, config.gistnet or None)
  lensnet = None
  if config.lensnet:
    lensnet = functools.partial(
      load_lensnet, near, config.lensnet, gistnet=gistnet)
    lensnet()  # what does not fit is told at once
  with Engine(lm, loop, slots=config.slots, splices=config.splices or None,
              gistnet=gistnet, lensnet=lensnet) as engine:
    engine.warm_up()
    server = Server(
      Histories(engine, config.root, limits.wait_seconds), key, limits)
    runner = uvicorn.Server(uvicorn.Config(
      server.app(), host=config.host, port=config.port, log_level="warning",
      timeout_graceful_shutdown=30))
    with _told_by_signals(server, runner):
      _tell(runner, f"Serving {lm.name} on http://{config.host}:{config.port}")
      runner.run()
    server.close()
  print("Stopped; everything is committed.", file=sys.stderr)


def _mesh(config):
  """The devices that serve; None is the default one."""
  sizes = config.mesh_data, config.mesh_fsdp, config.mesh_tensor
  return None if sizes == (1, 1, 1) else sharding.make_mesh(*sizes)


def _tell(runner: uvicorn.Server, line: str) -> None:
  """Prints the line once the server listens."""
  startup = runner.startup

  async def told(sockets=None) -> None:
    await startup(sockets)
    if runner.started:
      print(line, file=sys.stderr, flush=True)

  runner.startup = told


@contextlib.contextmanager
def _told_by_signals(server: Server, runner: uvicorn.Server) -> Iterator[None]:
  """SIGTERM and Ctrl-C end what is at work, then the server.

  uvicorn has handlers of its own while it runs and raises the signal again at
  its end, which must not end the process before everything is committed.
  """
  end = runner.handle_exit

  def stop(sig, frame) -> None:
    server.stop()
    end(sig, frame)

  runner.handle_exit = stop
  kept = {number: signal.signal(number, stop) for number in _SIGNALS}
  try:
    yield
  finally:
    for number, handler in kept.items():
      signal.signal(number, handler)
