"""Runs the server until it is told to stop; commits everything then."""

from __future__ import annotations

import os
import sys

from mcjax.base.load import load_base_lm
from mcjax.config import Config
from mcjax.runtime.engine import Engine
from mcjax.settings import read_fields
from mcjax.types import McjaxError


def run(config) -> None:
  """Serves; returns once a signal has stopped it and all is committed.

  Args:
    config: ConfigDict with base, dtype, host, port, root, slots, limits, loop.

  Raises:
    McjaxError: a setting is wrong, or the extra "serve" is not installed.
  """
  try:
    import uvicorn

    from mcjax.serve.app import Limits, Server
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
  lm = load_base_lm(config.base, dtype=config.dtype)
  with Engine(lm, loop, slots=config.slots) as engine:
    histories = Histories(engine, config.root)
    server = Server(histories, key, limits)
    print(f"Serving {lm.name} on http://{config.host}:{config.port}",
          file=sys.stderr, flush=True)
    try:
      uvicorn.run(server.app(), host=config.host, port=config.port,
                  log_level="warning", timeout_graceful_shutdown=30)
    finally:
      server.close()
