"""Configuration files: ConfigDicts of dataclasses, found from any folder."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
import dataclasses
import difflib
import pathlib
import runpy
import typing
from typing import Any

from ml_collections import config_dict
from ml_collections.config_flags import config_path

from mcjax.settings import check_names, plain_type
from mcjax.types import McjaxError


def defaults(kind, *, without: Collection[str] = (), **changes
             ) -> config_dict.ConfigDict:
  """Every field of a dataclass with its default, to be overridden.

  `mcjax.settings.read_fields` makes the dataclass of it again. A field that is
  None by default becomes a placeholder of its type.

  Args:
    kind: a dataclass, or an instance whose values are the defaults.
    without: fields that are left out.
    **changes: other values than the defaults.

  Raises:
    McjaxError: a change of an unknown field.
  """
  fields = {f.name: f for f in dataclasses.fields(kind)
            if f.name not in without}
  check_names("config", changes, fields)
  hints = typing.get_type_hints(kind if isinstance(kind, type) else type(kind))
  out = config_dict.ConfigDict()
  for name, field in fields.items():
    value = _default(field) if isinstance(kind, type) else getattr(kind, name)
    out[name] = _entry(value, hints[name])
  out.update(changes)
  return out


def unset(kind, *, without: Collection[str] = (), **changes
          ) -> config_dict.ConfigDict:
  """A placeholder for every field of a dataclass, for what decides later.

  None stands for "as it would be": the default for the base model, or what the
  trained weights have that a run starts from.
  """
  out = config_dict.ConfigDict({
    name: config_dict.placeholder(plain_type(hint))
    for name, hint in typing.get_type_hints(kind).items()
    if name not in without})
  check_names("config", changes, out)
  out.update(changes)
  return out


def _default(field: dataclasses.Field):
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return None if field.default is dataclasses.MISSING else field.default


def _entry(value, hint):
  if dataclasses.is_dataclass(value):
    return defaults(value)
  return config_dict.placeholder(plain_type(hint)) if value is None else value


def find(name: str, folder: pathlib.Path) -> str:
  """The path of a configuration file, with its ":argument".

  Args:
    name: a path from here; else below `folder`, with or without
      "experiments/configs/" before it and ".py" behind it.
    folder: of the configurations that come with the project.

  Raises:
    McjaxError: there is none.
  """
  path, colon, argument = name.partition(":")
  inside = path.removeprefix("experiments/configs/").removesuffix(".py") + ".py"
  for found in (pathlib.Path(path), folder / inside):
    if path and found.is_file():
      return f"{found.resolve()}{colon}{argument}"
  what = f"no file {path!r} here" if path else "name one"
  known = names(folder)
  near = difflib.get_close_matches(inside.removesuffix(".py"), known, 1)
  if near:
    raise McjaxError(f"--config: {what}; did you mean {near[0]}?")
  raise McjaxError(f"--config: {what}; configurations that come with mcjax are "
                   + ", ".join(known))


def names(folder: pathlib.Path) -> list[str]:
  """The configurations below a folder, as `find` takes them."""
  return sorted(
    str(path.relative_to(folder).with_suffix("")) for path in
    folder.rglob("*.py") if "def get_config" in path.read_text("utf-8"))


def load(path: str) -> config_dict.ConfigDict:
  """What `get_config` of a file returns, locked.

  Raises:
    McjaxError: the file has no `get_config`, or it fails.
  """
  file, colon, argument = path.partition(":")
  try:
    get_config = runpy.run_path(file, run_name="config")["get_config"]
    return get_config(*([argument] if colon else [])).lock()
  except McjaxError:
    raise
  except Exception as error:  # whatever a user's file raises
    reason = str(error).strip().splitlines() or [""]
    raise McjaxError(
      f"--config={path}: {type(error).__name__}: {reason[-1]}") from error


def override(argument: str, config: config_dict.ConfigDict) -> str:
  """Checks one "--config.key=value"; returns it as ml_collections reads it.

  The items of a tuple may be given with nothing but commas between them.

  Raises:
    McjaxError: names a setting that is not there, and the nearest one.
  """
  flag, equals, value = argument.partition("=")
  path = flag.lstrip("-").partition(".")[2]
  old = _walk(path, config)
  if equals and isinstance(old, tuple) and not _literal(value):
    items = tuple(item for item in value.split(",") if item)
    return f"{flag}={items!r}"
  return argument


def _walk(path: str, config):
  """The value at "a.b[0].c"."""
  try:
    parts = config_path.split(path)
  except (ValueError, SyntaxError):
    raise McjaxError(f"--config.{path}: not the name of a setting") from None
  place, here = "config", config
  for part in parts:
    if isinstance(here, Mapping | config_dict.ConfigDict):
      check_names(place, [str(part)], map(str, here))
      here, place = here[part], f"{place}.{part}"
    elif isinstance(here, tuple | list) and part in range(len(here)):
      here, place = here[part], f"{place}[{part}]"
    else:
      raise McjaxError(f"{place} has no part {part!r}")
  return here


def _literal(text: str) -> bool:
  try:
    ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return False
  return True


def flat(config: config_dict.ConfigDict, before: str = "config"
         ) -> dict[str, Any]:
  """{"config.a.b": value} of every setting."""
  out = {}
  for name, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      out |= flat(value, f"{before}.{name}")
    else:
      out[f"{before}.{name}"] = value
  return out
