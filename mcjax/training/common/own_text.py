"""A user's own files as documents: text of any kind, JSON lines, Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import glob
import json
import pathlib

from mcjax.runtime import text_files
from mcjax.training.common.sources import Document
from mcjax.types import McjaxError


def read(patterns: Iterable[str], suffixes: tuple[str, ...] = (),
         field: str = "text") -> Iterator[Document]:
  """Documents of files, one at a time.

  Args:
    patterns: files, folders and patterns such as "notes/**/*.md".
    suffixes: in folders only files that end so.
    field: of a .jsonl line or a .parquet row that holds a document's text.

  Yields:
    (name, text); the rows of .jsonl and .parquet files are documents of
    their own.

  Raises:
    McjaxError: a pattern finds nothing, or a file cannot be read.
  """
  for pattern in patterns:
    found = sorted(glob.glob(pattern, recursive=True)) or [pattern]
    for path in found:
      if path.endswith(".jsonl"):
        yield from _json_lines(path, field)
      elif path.endswith(".parquet"):
        yield from _parquet(path, field)
      elif pathlib.Path(path).is_dir() and found != [pattern]:
        continue  # a pattern finds the files in it by itself
      else:
        for file in text_files.read_documents([path], suffixes):
          yield file.name, file.text


def _json_lines(path: str, field: str) -> Iterator[Document]:
  try:
    with open(path, encoding="utf-8") as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          yield f"{path}:{number}", str(json.loads(line)[field])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise McjaxError(f"{path}: no text under {field!r} ({error})") from error


def _parquet(path: str, field: str) -> Iterator[Document]:
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise McjaxError(f"{path}: reading Parquet needs pyarrow; pip install "
                     "pyarrow") from error
  try:
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(columns=[field]):
      for text in batch.column(0).to_pylist():
        number += 1
        yield f"{path}:{number}", text or ""
  except (OSError, ValueError, KeyError, IndexError) as error:
    raise McjaxError(f"{path}: no text under {field!r} ({error})") from error
