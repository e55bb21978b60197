"""What the tools for stored trees share: --json and --base."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags

from mcjax.types import McjaxError

BASE = flags.DEFINE_string(
  "base", "", "Base LM, where one is needed; the tree's, by its name.")
# --json alone is standard output, --json=FILE a file.
_JSON = flags.DEFINE_flag(flags.Flag(
  flags.ArgumentParser(), flags.ArgumentSerializer(), "json", "",
  "Report as JSON, to standard output or =FILE.", boolean=True))


def one_tree(argv: list[str]) -> str:
  """The url that a command line names. Raises: McjaxError."""
  if len(argv) != 2:
    raise McjaxError("name one tree: its path or url")
  return argv[1]


def tell(text: str, fields: dict[str, Any]) -> None:
  """Prints the text, or the fields as --json wants them.

  Raises:
    McjaxError: the file cannot be written.
  """
  target = _JSON.value
  if target == "true":
    print(json.dumps(fields, indent=1))
    return
  print(text)
  if target not in ("", "false"):
    try:
      pathlib.Path(target).write_text(
        json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
      raise McjaxError(f"could not write {target}: {error}") from error
