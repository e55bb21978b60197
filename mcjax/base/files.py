"""Files of a model folder, read with a limit; each mistake is one line."""

from __future__ import annotations

import json
import os
import pathlib
import stat
from typing import Any

from mcjax.types import McjaxError

MAX_JSON = 1 << 22  # bytes of a settings file
MAX_INDEX = 1 << 25  # of an index of shards


def is_file(path: pathlib.Path) -> bool:
  """Whether there is a regular file.

  Raises:
    McjaxError: something else is there: a folder, a pipe, a device.
  """
  try:
    mode = os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    return False
  except (OSError, ValueError) as e:
    raise McjaxError(f"cannot read {path.name}: {e}") from e
  if not stat.S_ISREG(mode):
    raise McjaxError(f"{path.name} is not a regular file")
  return True


def read_text(path: pathlib.Path, limit: int = MAX_JSON) -> str:
  """The text of a regular file of at most `limit` bytes.

  Raises:
    McjaxError: it is missing, not a regular file, too long or not UTF-8.
  """
  if not is_file(path):
    raise McjaxError(f"cannot read {path.name}: No such file or directory")
  try:
    with path.open("rb") as file:
      data = file.read(limit + 1)
  except OSError as e:
    raise McjaxError(f"cannot read {path.name}: {e.strerror}") from e
  if len(data) > limit:
    raise McjaxError(f"{path.name} is longer than {limit} bytes")
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise McjaxError(f"{path.name} is not UTF-8 text: {e}") from e


def read_json(path: pathlib.Path, limit: int = MAX_JSON) -> dict[str, Any]:
  """Parses a JSON object.

  Raises:
    McjaxError: as `read_text`, or it is malformed or no object.
  """
  text = read_text(path, limit)
  try:
    value = json.loads(text)
  except RecursionError as e:
    raise McjaxError(f"{path.name} is nested too deeply") from e
  except ValueError as e:
    raise McjaxError(f"{path.name} is not JSON: {e}") from e
  if not isinstance(value, dict):
    raise McjaxError(f"{path.name} holds no JSON object")
  return value


def optional_json(path: pathlib.Path, limit: int = MAX_JSON) -> dict[str, Any]:
  """As `read_json`; empty where there is no such file."""
  return read_json(path, limit) if is_file(path) else {}
