"""What every command line shares: one-line errors, quiet libraries, configs."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import logging
import pathlib
import sys

from mcjax.config import Config
from mcjax.types import McjaxError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Prints a user's mistake as one line and exits with status 1."""
  logging.getLogger("jax").setLevel(logging.WARNING)
  try:
    yield
  except McjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def loop_config(values: dict) -> Config:
  """A `Config` from plain values.

  Raises:
    McjaxError: names an unknown field or an invalid value.
  """
  known = {field.name for field in dataclasses.fields(Config)}
  unknown = sorted(set(values) - known)
  if unknown:
    raise McjaxError(
      f"config.{unknown[0]} is not a setting of the loop; known are "
      + ", ".join(sorted(known))
    )
  return Config(**values)


def use_compilation_cache(folder: pathlib.Path) -> None:
  """Keeps XLA programs on disk, so that the next start compiles nothing."""
  import jax

  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
