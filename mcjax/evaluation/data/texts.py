"""Real text for the evaluations: the running Python's standard library.

It is on every machine that runs Python, about 10M tokens long, and no network
is needed. Other text can be given as files or folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import pathlib
import sysconfig

import numpy as np

from mcjax.runtime.text_files import read_documents
from mcjax.types import McjaxError


def pieces(paths: Sequence[str] = ()) -> Iterator[str]:
  """Texts of the files in a fixed order; of the standard library by default."""
  if paths:
    yield from (d.text for d in read_documents(list(paths)))
    return
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  for file in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
    if "site-packages" not in file.parts:
      yield file.read_text(encoding="utf-8", errors="replace")


def tokens(tokenizer, count: int, paths: Sequence[str] = (),
           skip: int = 0) -> np.ndarray:
  """`count` token ids [n] int32 of real text, repeated where it is shorter.

  Args:
    tokenizer: of the base.
    count: how many.
    paths: files and folders; the standard library if empty.
    skip: tokens left out at the front.

  Raises:
    McjaxError: the files hold no text.
  """
  parts, have = [], 0
  for text in pieces(paths):
    ids = tokenizer.encode(text) if text else np.zeros(0, np.int32)
    parts.append(ids)
    have += len(ids)
    if have >= count + skip:
      break
  if not have:
    raise McjaxError("the given files hold no text")
  ids = np.concatenate(parts)
  return np.resize(ids, count + skip)[skip:].astype(np.int32)


def text(tokenizer, count: int, paths: Sequence[str] = ()) -> str:
  """Real text of about `count` tokens."""
  return tokenizer.decode(tokens(tokenizer, count, paths).tolist())
