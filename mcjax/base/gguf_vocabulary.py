"""Rebuilds a fast tokenizer from the vocabulary in a GGUF file.

GGUF stores tokens, their kinds, merges or scores, and the name of a
pre-tokenizer; the rules behind each name are those of llama.cpp's
src/llama-vocab.cpp and of the tokenizer.json that the models ship.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mcjax.base.gguf_file import GgufFile
from mcjax.types import McjaxError

_MAX_PIECE, _MAX_PIECES = 1 << 10, 1 << 22  # characters: of one, of all
# Token kinds of gguf.TokenType.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r"|\s+(?!\S)|\s+"
)
_QWEN35 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
  r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_TAILS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
  f"{_LETTERS}{_UPPER}*{_LOWER}+{_TAILS}|{_LETTERS}{_UPPER}+{_LOWER}*{_TAILS}"
  r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (  # letters that have a case
  "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4"
  "-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386"
  "\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
  "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-"
  "\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-"
  "\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
  "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6"
  "-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-"
  "\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
  "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183"
  "\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
  "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
  "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-"
  "\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
  "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-"
  "\U0001e943"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
  r"[\r\n]", rf"\s?[{_CASED}]+",
  r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
  r"\s+$", _HAN, r"\p{N}+")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")
_DEEPSEEK3 = (
  r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
  r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
  r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")


class _Rules(NamedTuple):
  """How a byte-level BPE splits text before its merges.

  Attributes:
    patterns: words to split off, one pattern after another.
    nfc: normalise to NFC first.
    whole_words: a word that is a token needs no merges.
    adds_bos: unless the file says otherwise.
  """

  patterns: tuple[str, ...]
  nfc: bool = False
  whole_words: bool = False
  adds_bos: bool = False


_LLAMA3_RULES = _Rules((_LLAMA3,), whole_words=True, adds_bos=True)
_DIGITS_RULES = _Rules((r"\p{N}", _GPT2))
_GPT2_RULES, _QWEN2_RULES = _Rules((_GPT2,)), _Rules((_QWEN2,), nfc=True)
_RULES = {
  "gpt-2": _GPT2_RULES,
  "phi-2": _GPT2_RULES,
  "mpt": _GPT2_RULES,
  "olmo": _GPT2_RULES,
  "gigachat": _GPT2_RULES,
  "smollm": _DIGITS_RULES,
  "starcoder": _DIGITS_RULES,
  "refact": _DIGITS_RULES,
  "codeshell": _DIGITS_RULES,
  "exaone": _DIGITS_RULES,
  "command-r": _DIGITS_RULES._replace(nfc=True),
  "qwen2": _QWEN2_RULES,
  "deepseek-r1-qwen": _QWEN2_RULES,
  "qwen35": _Rules((_QWEN35,)),
  "stablelm2": _Rules((_QWEN2,)),
  "llama-bpe": _LLAMA3_RULES,
  "llama3": _LLAMA3_RULES,
  "llama-v3": _LLAMA3_RULES,
  "falcon3": _LLAMA3_RULES,
  "lfm2": _LLAMA3_RULES,
  "smaug-bpe": _Rules((_LLAMA3,)),
  "dbrx": _Rules((_LLAMA3,)),
  "glm4": _Rules((_LLAMA3,)),
  "gpt-4o": _Rules((_GPT4O,)),
  "llama4": _Rules((_GPT4O,)),
  "tekken": _Rules((_TEKKEN,), whole_words=True, adds_bos=True),
  "falcon": _Rules(_FALCON),
  "deepseek-llm": _Rules(_DEEPSEEK_LLM),
  "deepseek-coder": _Rules(_DEEPSEEK_CODER),
  "deepseek-v3": _Rules(_DEEPSEEK3),
}


class Vocabulary(NamedTuple):
  """A tokenizer and what the GGUF file says about its use.

  Attributes:
    core: the tokenizer.
    bos_id: begin-of-text id or None.
    adds_bos: whether it belongs before a text.
    stop_ids: end-of-text and end-of-turn ids.
    template: chat template or None.
    names: `bos_token` and `eos_token` as template variables.
  """

  core: tokenizers.Tokenizer
  bos_id: int | None
  adds_bos: bool
  stop_ids: tuple[int, ...]
  template: str | None
  names: dict[str, str]


def read(file: GgufFile) -> Vocabulary:
  """Rebuilds the tokenizer of an open GGUF file.

  Raises:
    McjaxError: the file has no vocabulary, a malformed one, or its tokenizer
      is neither byte-level BPE with a known pre-tokenizer nor SentencePiece
      BPE.
  """
  fields = _Fields(file)
  tokens, kind = fields.texts("ggml.tokens"), fields.text("ggml.model")
  if not tokens:
    raise McjaxError("the GGUF file has no 'tokenizer.ggml.tokens'")
  if len(set(tokens)) != len(tokens):
    raise McjaxError("'tokenizer.ggml.tokens' names a token twice")
  kinds = fields.numbers("ggml.token_type", len(tokens))
  kinds = [_NORMAL] * len(tokens) if kinds is None else kinds
  if kind == "gpt2":
    name = fields.text("ggml.pre")
    if name not in _RULES:
      raise McjaxError(
        f"unsupported tokenizer.ggml.pre={name!r}; known: {', '.join(_RULES)}"
      )
    rules = _RULES[name]
    core = _byte_level(tokens, fields.texts("ggml.merges"), rules)
    adds_bos = rules.adds_bos
  elif kind == "llama":
    scores = fields.numbers("ggml.scores", len(tokens))
    if scores is None:
      raise McjaxError(
        "the GGUF file has no 'tokenizer.ggml.scores' for every token"
      )
    unknown = fields.token("ggml.unknown_token_id", tokens)
    prefix = fields.flag("ggml.add_space_prefix", True)
    core = _sentence_piece(tokens, kinds, scores, tokens[unknown or 0], prefix)
    adds_bos = True
  elif kind == "gemma4":
    unknown = fields.token("ggml.unknown_token_id", tokens)
    core = _blank_bpe(
      {t: i for i, t in enumerate(tokens)},
      _pairs(fields.texts("ggml.merges")), tokens[unknown or 0],
      fields.flag("ggml.add_space_prefix", False))
    lines = tokenizers.Regex(r"[^\n]+|\n+")
    core.pre_tokenizer = pre_tokenizers.Split(lines, behavior="isolated")
    adds_bos = True
  else:
    raise McjaxError(
      f"unsupported tokenizer.ggml.model={kind!r}; known: gpt2, llama, gemma4"
    )
  for special, code in ((True, _CONTROL), (False, _USER_DEFINED)):
    core.add_tokens(
      [
        tokenizers.AddedToken(t, normalized=False, special=special)
        for t, k in zip(tokens, kinds, strict=True)
        if t and (k == code or (special and k == _UNKNOWN))
      ]
    )
  bos, eos, eot = (fields.token(f"ggml.{name}_token_id", tokens)
                   for name in ("bos", "eos", "eot"))
  names = {"bos_token": bos, "eos_token": eos}
  return Vocabulary(
    core=core,
    bos_id=bos,
    adds_bos=fields.flag("ggml.add_bos_token", adds_bos),
    stop_ids=tuple(i for i in (eos, eot) if i is not None),
    template=fields.text("chat_template"),
    names={k: tokens[i] for k, i in names.items() if i is not None},
  )


class _Fields:
  """The metadata of a tokenizer, each of the kind that it must be."""

  def __init__(self, file: GgufFile):
    self._file = file

  def _get(self, key: str, right: Callable[[Any], bool], kind: str) -> Any:
    value = self._file.get(f"tokenizer.{key}")
    if value is not None and not right(value):
      raise McjaxError(f"'tokenizer.{key}' of the GGUF file is no {kind}")
    return value

  def text(self, key: str) -> str | None:
    return self._get(key, lambda v: isinstance(v, str), "text")

  def texts(self, key: str) -> list[str]:
    return self._get(key, lambda v: isinstance(v, list), "list of texts") or []

  def flag(self, key: str, default: bool) -> bool:
    value = self._get(key, lambda v: isinstance(v, bool), "true or false")
    return default if value is None else value

  def numbers(self, key: str, count: int) -> list | None:
    """As many numbers as there are tokens."""
    value = self._get(
      key, lambda v: isinstance(v, np.ndarray), "array of numbers")
    if value is not None and len(value) != count:
      raise McjaxError(
        f"the GGUF file has {count} tokens but {len(value)} in "
        f"'tokenizer.{key}'")
    return None if value is None else value.tolist()

  def token(self, key: str, tokens: list[str]) -> int | None:
    """The id of a token."""
    return self._get(
      key, lambda v: isinstance(v, int) and 0 <= v < len(tokens), "token's id")


def _byte_level(tokens, merges, rules: _Rules) -> tokenizers.Tokenizer:
  """GPT-2 style BPE over bytes."""
  core = _bpe(
    vocab={t: i for i, t in enumerate(tokens)}, merges=_pairs(merges),
    ignore_merges=rules.whole_words)
  steps: list = [
    pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    for pattern in rules.patterns
  ]
  steps.append(
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
  core.pre_tokenizer = pre_tokenizers.Sequence(steps)
  if rules.nfc:
    core.normalizer = normalizers.NFC()
  core.decoder = decoders.ByteLevel()
  return core


def _pairs(merges: list[str]) -> list[tuple]:
  pairs = [tuple(m.split(" ", 1)) for m in merges]
  if any(len(pair) != 2 for pair in pairs):
    raise McjaxError("'tokenizer.ggml.merges' holds what is no pair")
  return pairs


def _bpe(**settings) -> tokenizers.Tokenizer:
  """A tokenizer of merges that are in its vocabulary."""
  try:
    return tokenizers.Tokenizer(models.BPE(**settings))
  except Exception as e:  # the Rust side raises bare Exception
    raise McjaxError(f"the merges do not fit the tokens: {e}") from e


def _sentence_piece(
  tokens, kinds, scores, unknown: str, prefix: bool
) -> tokenizers.Tokenizer:
  """SentencePiece BPE with byte fallback; merges follow the scores.

  A piece is merged from every pair of pieces that spells it; better scores
  first, as in transformers' converter for slow tokenizers.
  """
  if sum(map(len, tokens)) > _MAX_PIECES or max(map(len, tokens)) > _MAX_PIECE:
    raise McjaxError("'tokenizer.ggml.tokens' holds too long pieces")
  ids = {t: i for i, t in enumerate(tokens)}
  merges = []
  for piece, kind, score in zip(tokens, kinds, scores, strict=True):
    if kind not in (_NORMAL, _USER_DEFINED):
      continue
    pairs = [
      (piece[:i], piece[i:])
      for i in range(1, len(piece))
      if piece[:i] in ids and piece[i:] in ids
    ]
    pairs.sort(key=lambda p: (ids[p[0]], ids[p[1]]))
    merges += [
      (score, len(left), len(right), left, right) for left, right in pairs
    ]
  merges.sort(key=lambda m: m[:3], reverse=True)
  return _blank_bpe(ids, [m[3:] for m in merges], unknown, prefix)


def _blank_bpe(
  ids: dict[str, int], merges: list, unknown: str, prefix: bool
) -> tokenizers.Tokenizer:
  """BPE over characters with byte fallback; blanks are spelled "▁"."""
  core = _bpe(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True,
              byte_fallback=True)
  steps: list[normalizers.Normalizer] = (
    [normalizers.Prepend("▁")] if prefix else [])
  steps.append(normalizers.Replace(" ", "▁"))
  core.normalizer = normalizers.Sequence(steps)
  ends = [decoders.Strip(" ", 1, 0)] if prefix else []
  core.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *ends,
    ]
  )
  return core
