"""Rebuilds a fast tokenizer from the vocabulary in a GGUF file.

GGUF stores tokens, their kinds, merges or scores, and the name of a
pre-tokenizer; the rules behind each name are those of llama.cpp's
src/llama-vocab.cpp and of the tokenizer.json that the models ship.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mcjax.types import McjaxError

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


class _Rules(NamedTuple):
  """How a byte-level BPE splits text before its merges.

  Attributes:
    pattern: words to split off; None for GPT-2's own pattern.
    digits: every digit alone, before the pattern.
    nfc: normalise to NFC first.
    whole_words: a word that is a token needs no merges.
    adds_bos: unless the file says otherwise.
  """

  pattern: str | None = None
  digits: bool = False
  nfc: bool = False
  whole_words: bool = False
  adds_bos: bool = False


_LLAMA3_RULES = _Rules(_LLAMA3, whole_words=True, adds_bos=True)
_RULES = {
  "gpt-2": _Rules(),
  "smollm": _Rules(digits=True),
  "qwen2": _Rules(_QWEN2, nfc=True),
  "llama-bpe": _LLAMA3_RULES,
  "llama3": _LLAMA3_RULES,
  "llama-v3": _LLAMA3_RULES,
  "smaug-bpe": _Rules(_LLAMA3),
  "tekken": _Rules(_TEKKEN, whole_words=True, adds_bos=True),
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


def read(reader) -> Vocabulary:
  """Rebuilds the tokenizer of an open `gguf.GGUFReader`.

  Raises:
    McjaxError: the file has no vocabulary, or its tokenizer is neither
      byte-level BPE with a known pre-tokenizer nor SentencePiece BPE.
  """

  def get(key: str, default: Any = None) -> Any:
    field = reader.get_field(f"tokenizer.{key}")
    return default if field is None else field.contents()

  tokens, kind = get("ggml.tokens"), get("ggml.model")
  if not tokens:
    raise McjaxError("the GGUF file has no 'tokenizer.ggml.tokens'")
  kinds = get("ggml.token_type") or [_NORMAL] * len(tokens)
  if len(kinds) != len(tokens):
    raise McjaxError(
      f"the GGUF file has {len(tokens)} tokens but {len(kinds)} token types"
    )
  if kind == "gpt2":
    name = get("ggml.pre")
    if name not in _RULES:
      raise McjaxError(
        f"unsupported tokenizer.ggml.pre={name!r}; known: {', '.join(_RULES)}"
      )
    rules = _RULES[name]
    core = _byte_level(tokens, get("ggml.merges") or [], rules)
    adds_bos = rules.adds_bos
  elif kind == "llama":
    scores = get("ggml.scores")
    if not scores or len(scores) != len(tokens):
      raise McjaxError(
        "the GGUF file has no 'tokenizer.ggml.scores' for every token"
      )
    unknown = tokens[get("ggml.unknown_token_id", 0)]
    prefix = get("ggml.add_space_prefix", True)
    core = _sentence_piece(tokens, kinds, scores, unknown, prefix)
    adds_bos = True
  else:
    raise McjaxError(
      f"unsupported tokenizer.ggml.model={kind!r}; known: gpt2, llama"
    )
  for special, code in ((True, _CONTROL), (False, _USER_DEFINED)):
    core.add_tokens(
      [
        tokenizers.AddedToken(t, normalized=False, special=special)
        for t, k in zip(tokens, kinds, strict=True)
        if k == code or (special and k == _UNKNOWN)
      ]
    )
  bos, eos = get("ggml.bos_token_id"), get("ggml.eos_token_id")
  names = {"bos_token": bos, "eos_token": eos}
  return Vocabulary(
    core=core,
    bos_id=bos,
    adds_bos=bool(get("ggml.add_bos_token", adds_bos)),
    stop_ids=tuple(i for i in (eos, get("ggml.eot_token_id")) if i is not None),
    template=get("chat_template"),
    names={k: tokens[i] for k, i in names.items() if i is not None},
  )


def _byte_level(tokens, merges, rules: _Rules) -> tokenizers.Tokenizer:
  """GPT-2 style BPE over bytes."""
  core = tokenizers.Tokenizer(
    models.BPE(
      vocab={t: i for i, t in enumerate(tokens)},
      merges=[tuple(m.split(" ", 1)) for m in merges],
      ignore_merges=rules.whole_words,
    )
  )
  steps: list[pre_tokenizers.PreTokenizer] = []
  if rules.digits:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if rules.pattern is not None:
    pattern = tokenizers.Regex(rules.pattern)
    steps.append(pre_tokenizers.Split(pattern, behavior="isolated"))
  steps.append(
    pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=rules.pattern is None
    )
  )
  core.pre_tokenizer = pre_tokenizers.Sequence(steps)
  if rules.nfc:
    core.normalizer = normalizers.NFC()
  core.decoder = decoders.ByteLevel()
  return core


def _sentence_piece(
  tokens, kinds, scores, unknown: str, prefix: bool
) -> tokenizers.Tokenizer:
  """SentencePiece BPE with byte fallback; merges follow the scores.

  A piece is merged from every pair of pieces that spells it; better scores
  first, as in transformers' converter for slow tokenizers.
  """
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
  core = tokenizers.Tokenizer(
    models.BPE(
      vocab=ids,
      merges=[m[3:] for m in merges],
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
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
