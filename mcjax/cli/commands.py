"""What every command line shares: configurations, help, one-line errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import logging
import pathlib
import re
import sys

from absl import app, flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from mcjax.cli import configs
from mcjax.types import McjaxError

_HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull", "-helpfull")
# What a value should have been, by the beginning of Python's complaint.
_KINDS = {"invalid literal for int": "a whole number",
          "could not convert string to float": "a number",
          "Non-boolean argument": "True or False"}
_PROFILE = flags.DEFINE_string(
  "profile", "", "Write a trace of JAX there, for TensorBoard or Perfetto.")
# The arguments that the configuration's overrides are taken from. They are
# known once `run` has seen the command line; until then there is a --config,
# so that nothing is loaded.
_ARGUMENTS = ["", "--config="]


def define_workdir(help_text: str):
  """The --workdir flag of a main that keeps something."""
  return flags.DEFINE_string("workdir", None, help_text, required=True)


@contextlib.contextmanager
def one_line_errors(status: int = 1) -> Iterator[None]:
  """Prints a user's mistake as one line and exits with a status."""
  logging.getLogger("jax").setLevel(logging.WARNING)
  try:
    yield
  except McjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


class ConfigFlag:
  """The --config flag of a main, whose configurations lie beside it.

  Attributes:
    folder: of the configurations.
    default: the one taken if none is named.
    arguments: --config and its overrides, as another process can take them.
  """

  def __init__(self, main_file: str, default: str):
    """`default` is a file of the folder `configs` beside `main_file`.

    "" makes the user name one.
    """
    self.folder = pathlib.Path(main_file).parent / "configs"
    self.default = default
    self.arguments: list[str] = []
    self._flag = config_flags.DEFINE_config_file(
      "config", default, "Settings; --config.key=value overrides one.",
      sys_argv=_ARGUMENTS)

  @property
  def value(self):
    """The ConfigDict, overridden."""
    return self._flag.value

  def arrange(self, arguments: list[str]) -> list[str]:
    """The arguments with the one --config first, all overrides checked.

    Raises:
      McjaxError: names the file or the setting that is not there.
    """
    arguments, name = _take_config(arguments)
    path = configs.find(name or self.default, self.folder)
    config = configs.load(path)
    given = [configs.override(a, config) if _is_override(a) else a
             for a in _joined(arguments)]
    self.arguments = [f"--config={path}", *filter(_is_override, given)]
    return [f"--config={path}", *given]

  def describe(self, arguments: list[str]) -> str:
    """The settings of the configuration that the arguments name."""
    name = _take_config(arguments)[1] or self.default
    if not name:
      return "configurations: " + ", ".join(configs.names(self.folder))
    config = configs.load(configs.find(name, self.folder))
    return "\n".join(f"  --{k}={v}" for k, v in configs.flat(config).items())


def _is_override(argument: str) -> bool:
  return argument.startswith(("--config.", "-config.", "--noconfig."))


def _take_config(arguments: list[str]) -> tuple[list[str], str]:
  """The other arguments, and what the last --config says; "" without one."""
  rest, name, left = [], "", iter(arguments)
  for argument in left:
    flag, equals, value = argument.partition("=")
    if flag in ("--config", "-config"):
      name = value if equals else next(left, "")
    else:
      rest.append(argument)
  return rest, name


def _joined(arguments: list[str]) -> Iterator[str]:
  """ "--config.a", "1" as "--config.a=1"."""
  left = iter(arguments)
  for argument in left:
    if argument.startswith("--config.") and "=" not in argument:
      value = next(left, "true")
      if value.startswith("--"):
        yield f"{argument}=true"
        yield value
        continue
      argument = f"{argument}={value}"
    yield argument


def run(main: Callable[[list[str]], None], config: ConfigFlag | None = None,
        flags_of: tuple[str, ...] = (), rest: bool = False,
        status: int = 1) -> None:
  """`absl.app.run` with help, --profile and one line for a user's mistake.

  Args:
    main: gets the program's name and the arguments that are no flags.
    config: its --config flag, if it has one.
    rest: whether there may be such arguments.
    flags_of: further modules whose flags --help tells.
    status: of the process after a user's mistake.
  """
  absl_logging.set_verbosity(absl_logging.WARNING)
  jax.config.config_with_absl()

  def guarded(argv: list[str]) -> None:
    with one_line_errors(status), _profile():
      main(argv)

  def parse(argv: list[str]) -> list[str]:
    with one_line_errors(status):
      return _parse(argv, main, config, flags_of, rest)

  app.run(guarded, flags_parser=parse)


def _parse(argv: list[str], main, config: ConfigFlag | None,
           flags_of: tuple[str, ...], rest: bool) -> list[str]:
  """The arguments left over; sets the flags. Raises: McjaxError."""
  try:
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    if set(_HELP) & set(argv):
      _print_help(main, config, flags_of,
                  [a for a in argv[1:] if a not in _HELP])
      sys.exit(0)
    if config is not None:
      argv = [argv[0], *config.arrange(argv[1:])]
    _ARGUMENTS[:] = argv
    flags.FLAGS.set_gnu_getopt(rest)  # flags may follow other arguments
    left = flags.FLAGS(argv)
  except (flags.Error, ValueError) as error:
    raise McjaxError(_plainly(" ".join(str(error).split()))) from error
  if len(left) > 1 and not rest:
    raise McjaxError(f"unknown argument: {left[1]} (--help tells the known "
                     "ones)")
  return left


def _plainly(complaint: str) -> str:
  """What is wrong with a flag's value, without Python's words for it."""
  for python, kind in _KINDS.items():
    found = re.match(rf"flag --(.+?)=(.*): \(?'?{python}", complaint)
    if found:
      return f"{found[1]} must be {kind}, got {found[2]!r}"
  return complaint


def _print_help(main, config: ConfigFlag | None, flags_of: tuple[str, ...],
                arguments: list[str]) -> None:
  module = sys.modules[main.__module__]
  own = sys.argv[0] if main.__module__ == "__main__" else main.__module__
  print((module.__doc__ or "").strip())
  for name in (own, *flags_of, __name__):
    print(flags.FLAGS.module_help(name))
  print("  --jax_…: options of JAX; --flagfile=FILE: arguments, a line each")
  if config is not None:
    print("\nSettings:\n" + config.describe(arguments))


@contextlib.contextmanager
def _profile() -> Iterator[None]:
  if not _PROFILE.value:
    yield
    return
  with jax.profiler.trace(_PROFILE.value):
    yield
  print(f"trace: {_PROFILE.value}", file=sys.stderr)
