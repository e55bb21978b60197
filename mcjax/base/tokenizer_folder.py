"""A tokenizer's files in a Hugging Face folder, read within limits."""

from __future__ import annotations

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import tokenizers

from mcjax.base import files, slow_tokenizer
from mcjax.types import McjaxError

# Limits of tokenizer.json; the largest in the field has 33 MB and 1.5M entries.
_MAX_FILE, _MAX_ENTRIES = 1 << 26, 1 << 22
_MAX_STEPS, _MAX_GROWTH = 64, 1 << 10
_OLDER = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
          "tiktoken.model")


def read_core(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Reads tokenizer.json, within limits, or has one made of older files."""
  path = folder / "tokenizer.json"
  if files.is_file(path):
    return core_of(files.read_text(path, _MAX_FILE))
  if not any(files.is_file(folder / name) for name in _OLDER):
    raise McjaxError(
      f"no tokenizer.json, and none of {', '.join(_OLDER)} to make it of")
  return core_of(slow_tokenizer.converted(folder))


def core_of(text: str) -> tokenizers.Tokenizer:
  """The tokenizer of a tokenizer.json's text, within limits."""
  if text.count(",") > _MAX_ENTRIES:
    raise McjaxError(f"tokenizer.json has more than {_MAX_ENTRIES} entries")
  try:
    core = tokenizers.Tokenizer.from_str(text)
    # Before anything is encoded: a text may be padded to any length.
    core.no_padding()
    core.no_truncation()
    _check_steps(json.loads(without_vocabulary(core)))
    core.encode("a", add_special_tokens=True)
  except McjaxError:
    raise
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as e:  # bare Exceptions, and panics of the Rust side
    why = " ".join(str(e).split())[:300]
    raise McjaxError(f"tokenizer.json is damaged: {why}") from e
  return core


def _check_steps(setup: Any) -> None:
  """Refuses steps that make ever longer texts of a short one."""
  growth, steps = 1.0, 0
  nodes = [setup]
  while nodes:
    node = nodes.pop()
    if isinstance(node, list):
      nodes += node
    elif isinstance(node, dict):
      nodes += node.values()
      steps += "type" in node
      if node.get("type") == "Replace":
        pattern = node.get("pattern") or {}
        old = pattern.get("String") if isinstance(pattern, dict) else ""
        new = len(node.get("content") or "")
        growth *= max(1, new / max(1, len(old or "")))
  if growth > _MAX_GROWTH or steps > _MAX_STEPS:
    raise McjaxError("tokenizer.json has steps that lengthen texts endlessly")


def folder_bos(core, settings: Mapping[str, Any], names: Mapping[str, str]
               ) -> int | None:
  """The id that the post-processor or `add_bos_token` puts in front."""
  if settings.get("add_bos_token") is False:
    return None
  plain = core.encode("a", add_special_tokens=False).ids
  full = core.encode("a", add_special_tokens=True).ids
  if full and full[0] != plain[0]:
    return full[0]
  if settings.get("add_bos_token"):
    return core.token_to_id(names.get("bos_token") or "")
  return None


def folder_template(folder: pathlib.Path, settings: dict) -> str | None:
  """chat_template.jinja, else the (default) entry of tokenizer_config."""
  path = folder / "chat_template.jinja"
  if files.is_file(path):
    return files.read_text(path)
  template = settings.get("chat_template")
  if isinstance(template, list):
    named = {t.get("name"): t.get("template") for t in template
             if isinstance(t, dict)}
    template = named.get("default")
  return template


def without_vocabulary(core: tokenizers.Tokenizer) -> str:
  """JSON of a tokenizer without its model."""
  bare = tokenizers.Tokenizer(tokenizers.models.BPE())
  for part in ("normalizer", "pre_tokenizer", "decoder"):
    if getattr(core, part) is not None:
      setattr(bare, part, getattr(core, part))
  return bare.to_str()
