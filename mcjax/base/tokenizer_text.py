"""Text as tokenizers see it: where it may be cut, and how bytes are spelled."""

from __future__ import annotations

from collections.abc import Iterable
import functools
import json
import re

import tokenizers

from mcjax.base.tokenizer_folder import without_vocabulary

# Texts are cut here when they are long: in every byte-level pre-tokenizer a
# letter followed by a blank or a newline ends a word, so no merge crosses it.
_CHUNK = 1 << 15
_CUT = re.compile(r"(?<=[A-Za-z])(?=[ \n])")


def pieces_of(text: str) -> list[str]:
  """Cuts a text into pieces of about _CHUNK characters at safe places."""
  pieces, start = [], 0
  while len(text) - start > _CHUNK:
    cut = _CUT.search(text, start + _CHUNK)
    if cut is None:
      break
    pieces.append(text[start : cut.start()])
    start = cut.start()
  return [*pieces, text[start:]]


def is_cuttable(core: tokenizers.Tokenizer, added: Iterable) -> bool:
  """Whether encoding the pieces of `pieces_of` equals encoding the whole."""
  setup = json.loads(without_vocabulary(core))
  pre = json.dumps(setup["pre_tokenizer"])
  normal = (setup["normalizer"] or {}).get("type")
  plain = '"ByteLevel"' in pre and '"add_prefix_space": true' not in pre
  loose = any(
    not t.special and (t.lstrip or t.rstrip or re.search(r"\s", t.content))
    for t in added
  )
  return plain and normal in (None, "NFC", "NFKC") and not loose


@functools.cache
def byte_alphabet() -> dict[str, int]:
  """The byte that each character of a byte-level vocabulary stands for."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return {chr(b): b for b in plain} | {
    chr(256 + i): b for i, b in enumerate(others)}
