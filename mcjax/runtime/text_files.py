"""Files, folders and standard input as named texts, ready to ingest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import os
import pathlib
import sys

from mcjax.types import McjaxError


@dataclasses.dataclass(frozen=True)
class TextFile:
  """One named text, not yet in a history.

  Attributes:
    name: path as given, or "-" for standard input.
    text: its text.
    replaced: bytes that are no UTF-8 and became U+FFFD.
  """

  name: str
  text: str
  replaced: int = 0


def decode(name: str, raw: bytes) -> TextFile:
  """UTF-8 with replacement; the count of replacements is reported."""
  text = raw.decode("utf-8", errors="replace")
  genuine = raw.count("\ufffd".encode())
  return TextFile(name, text, text.count("\ufffd") - genuine)


def read_documents(
  paths: Sequence[str], suffixes: Sequence[str] = ()
) -> Iterator[TextFile]:
  """Reads files, folders (recursively, sorted) and "-" for standard input.

  Empty and binary files (a NUL byte in the first 8 KiB) in folders are passed
  over; hidden ones too.

  Args:
    paths: what the user named.
    suffixes: in folders only files that end so; all by default.

  Raises:
    McjaxError: a path does not exist or cannot be read.
  """
  for name in paths:
    if name == "-":
      yield decode("-", sys.stdin.buffer.read())
      continue
    path = pathlib.Path(name)
    if path.is_dir():
      for file in sorted(_files(path, tuple(suffixes))):
        raw = _read(file)
        if raw and b"\0" not in raw[:8192]:
          yield decode(str(file), raw)
    else:
      yield decode(name, _read(path))


def _files(folder: pathlib.Path, suffixes: tuple[str, ...]):
  for root, folders, names in os.walk(folder):
    folders[:] = [
      f for f in folders if not f.startswith(".") and f != "__pycache__"
    ]
    for name in names:
      if not name.startswith(".") and name.endswith(suffixes or ""):
        yield pathlib.Path(root, name)


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise McjaxError(f"{path}: {error.strerror}") from None
