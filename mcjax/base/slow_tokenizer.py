"""Tokenizers that only `transformers` can read, as tokenizer.json has them."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

from mcjax.types import McjaxError


def converted(folder: pathlib.Path) -> str:
  """tokenizer.json of a folder that has none, as `transformers` makes it.

  Code that comes with a model is never run.

  Raises:
    McjaxError: it cannot; says what to install.
  """
  from transformers import AutoTokenizer

  try:
    with _quiet():
      tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True)
    return core_text(tokenizer)
  except Exception as e:  # its errors share no base class
    why = " ".join(str(e).split())[:200]
    raise McjaxError(
      "no tokenizer.json, and transformers cannot make one (sentencepiece "
      f"files need the sentencepiece and protobuf packages): {why}") from e


def core_text(tokenizer: Any) -> str:
  """JSON of the fast implementation of a tokenizer of `transformers`.

  Raises:
    McjaxError: it has none.
  """
  core = getattr(tokenizer, "backend_tokenizer", None)
  if core is not None:
    return core.to_str()
  from transformers.convert_slow_tokenizer import convert_slow_tokenizer

  try:
    return convert_slow_tokenizer(tokenizer).to_str()
  except Exception as e:  # of whatever the conversion lacks
    why = " ".join(str(e).split())[:200]
    raise McjaxError(f"the tokenizer {type(tokenizer).__name__} has no fast "
                     f"form: {why}") from e


@contextlib.contextmanager
def _quiet():
  """Without the library's warnings about what it converts."""
  from transformers.utils import logging

  before = logging.get_verbosity()
  logging.set_verbosity_error()
  try:
    yield
  finally:
    logging.set_verbosity(before)
