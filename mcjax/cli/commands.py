"""What every command line shares: one-line errors, quiet libraries, configs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import logging
import sys

from absl import app, flags
from ml_collections import config_flags

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


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
  """One line for a --config file or override that cannot be used."""
  try:
    yield
  except (AttributeError, KeyError, TypeError, ValueError, OSError,
          ImportError, SyntaxError) as error:
    text = str(error).replace("\\n", " ").replace("\\'", "'")
    reason = " ".join(text.split())
    print(f"error: --config: {reason}", file=sys.stderr)
    sys.exit(1)


def define_config(default: str):
  """The --config flag of an experiment; `default` is a file beside configs."""
  with _config_errors():
    return config_flags.DEFINE_config_file(
      "config", default, "Settings; --config.key=value overrides one."
    )


def run(main: Callable[[list[str]], None], config=None) -> None:
  """`absl.app.run` with a user's mistakes told in one line each.

  Args:
    main: gets the arguments left over, none.
    config: what `define_config` returned, to fail early if it does not load.
  """

  def parse(argv: list[str]) -> list[str]:
    try:
      with _config_errors():
        return flags.FLAGS(argv)
    except flags.Error as error:  # may hold a traceback; its end says why
      reason = [line for line in str(error).splitlines() if line.strip()][-1]
      reason = reason.strip().removeprefix("mcjax.types.McjaxError: ")
      print(f"error: {reason}", file=sys.stderr)
      sys.exit(1)

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unknown argument: {argv[1]}")
    if config is not None:
      with _config_errors():
        config.value.keys()
    with one_line_errors():
      main(argv)

  app.run(guarded, flags_parser=parse)


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
