"""The base LM's tokenizer: text to ids, ids to text, turns of a chat.

Wraps a fast Hugging Face tokenizer, read from tokenizer.json or rebuilt from
GGUF metadata, and renders the model's own chat template. Neither transformers
nor PyTorch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
import datetime
import functools
import hashlib
import json
import pathlib
import re
import threading
from typing import Any

import numpy as np
import tokenizers

from mcjax.base import gguf_vocabulary
from mcjax.types import McjaxError

# Texts are cut here when they are long: in every byte-level pre-tokenizer a
# letter followed by a blank or a newline ends a word, so no merge crosses it.
_CHUNK = 1 << 15
_CUT = re.compile(r"(?<=[A-Za-z])(?=[ \n])")
# Control tokens that end a turn or a document, as llama.cpp knows them.
_ENDS = (
  "<|endoftext|>",
  "<|end_of_text|>",
  "<|im_end|>",
  "<|eot_id|>",
  "<|eom_id|>",
  "</s>",
)
# How byte-level and SentencePiece vocabularies spell blanks and newlines.
_SPELLED = (("\u0120", " "), ("\u010a", "\n"), ("\u2581", " "),
            ("<0x0A>", "\n"))
# Stand-ins for the words of user and model while a template is taken apart.
_USER, _EARLIER, _ANSWER = "QzUserWordsQz", "QzEarlierQz", "QzAnswerQz"


class Tokenizer:
  """A base LM's tokenizer.

  Attributes:
    vocab_size: 1 + the largest id.
    bos_id: id that belongs before the first token of a text, or None if this
      tokenizer adds none. `encode` never adds it.
    stop_ids: ids that end a generated answer, ascending.
    special_ids: control tokens; ordinary text never encodes to them.
    has_chat_template: whether `chat_turn` has a template to fill.
  """

  def __init__(
    self,
    core: tokenizers.Tokenizer,
    *,
    bos_id: int | None = None,
    stop_ids: Iterable[int] = (),
    template: str | None = None,
    template_tokens: dict[str, str] | None = None,
  ):
    """Wraps a `tokenizers.Tokenizer`.

    Args:
      core: the tokenizer; its padding and truncation are switched off.
      bos_id: see the class.
      stop_ids: end-of-text ids; well-known ends of turns are added.
      template: chat template in Jinja, or None.
      template_tokens: variables of the template (`bos_token`, …).
    """
    core.no_padding()
    core.no_truncation()
    self._core = core
    self._lock = threading.Lock()
    self._template = template or ""
    self._template_tokens = template_tokens or {}
    self._vocab = core.get_vocab(with_added_tokens=True)
    added = core.get_added_tokens_decoder()
    self._cuttable = _cuttable(core, added.values())
    self.vocab_size = 1 + max(self._vocab.values())
    self.special_ids = frozenset(i for i, t in added.items() if t.special)
    self.bos_id = bos_id
    ends = {self._vocab[t] for t in _ENDS if t in self._vocab}
    self.stop_ids = tuple(
      sorted({int(i) for i in stop_ids} | (ends & self.special_ids))
    )
    self.has_chat_template = template is not None

  @classmethod
  def from_folder(cls, folder: pathlib.Path) -> Tokenizer:
    """Reads tokenizer.json and its companions in a Hugging Face folder.

    Raises:
      McjaxError: tokenizer.json is missing or malformed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
      raise McjaxError("no tokenizer.json (a fast tokenizer is needed)")
    try:
      core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the Rust side raises bare Exception
      raise McjaxError(f"tokenizer.json is damaged: {e}") from e
    settings = _optional_json(folder / "tokenizer_config.json")
    names: dict[str, Any] = {
      key: value.get("content") if isinstance(value, dict) else value
      for key, value in settings.items()
      if key.endswith("_token") and isinstance(value, (str, dict))
    }
    stops = [core.token_to_id(names.get("eos_token") or "")]
    for file in ("config.json", "generation_config.json"):
      ids = _optional_json(folder / file).get("eos_token_id")
      stops += ids if isinstance(ids, list) else [ids]
    return cls(
      core,
      bos_id=_folder_bos(core, settings, names),
      stop_ids=[i for i in stops if i is not None],
      template=_folder_template(folder, settings),
      template_tokens=names,
    )

  @classmethod
  def from_gguf(cls, reader) -> Tokenizer:
    """Rebuilds the tokenizer that a GGUF file describes.

    Args:
      reader: an open `gguf.GGUFReader`.

    Raises:
      McjaxError: the file has no tokenizer, or one of an unknown kind.
    """
    parts = gguf_vocabulary.read(reader)
    return cls(
      parts.core,
      bos_id=parts.bos_id if parts.adds_bos else None,
      stop_ids=parts.stop_ids,
      template=parts.template,
      template_tokens=parts.names,
    )

  def encode(self, text: str) -> np.ndarray:
    """Ids [T] int32 of a text, nothing added.

    Strings that look like control tokens ("<|im_end|>") are encoded as the
    characters they are, so a text cannot forge a turn. Tokens that the model
    declares as ordinary additions (Qwen's "<tool_call>") are recognised.
    Long texts are cut where no token can cross and encoded in parallel.

    Raises:
      McjaxError: the text holds lone surrogates, which UTF-8 has not.
    """
    pieces = _pieces(text) if self._cuttable else [text]
    try:
      with self._lock:
        self._core.encode_special_tokens = True
        encoded = self._core.encode_batch_fast(pieces, add_special_tokens=False)
    except (UnicodeEncodeError, TypeError) as e:
      raise McjaxError(f"the text is not valid Unicode: {e}") from e
    return np.concatenate([np.asarray(e.ids, np.int32) for e in encoded])

  def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
    """Text of ids; control tokens are left out unless `keep_special`."""
    return self._core.decode(
      np.asarray(ids).tolist(), skip_special_tokens=not keep_special
    )

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """Each token by itself, blanks and newlines as such.

    Bytes beyond ASCII stay in the vocabulary's own spelling.
    """
    out = []
    for i in np.asarray(ids).tolist():
      piece = self._core.id_to_token(i) or ""
      for spelling, character in _SPELLED:
        piece = piece.replace(spelling, character)
      out.append(piece)
    return out

  def vocabulary_digest(self) -> bytes:
    """SHA-256 of the tokens in the order of their ids."""
    text = json.dumps(
      [sorted((i, t) for t, i in self._vocab.items()), sorted(self.special_ids)]
    )
    return hashlib.sha256(text.encode()).digest()

  def largest_text_id(self) -> int:
    """The largest id that `encode` can give."""
    return max(i for i in self._vocab.values() if i not in self.special_ids)

  # --- Chat ------------------------------------------------------------------

  def chat_turn(
    self, prompt: str, first: bool
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a user's turn and of the opening of the model's answer.

    The first turn carries whatever the template puts in front of it: its
    default system prompt, and the BOS token if the template writes one. A
    later turn starts right behind `end_of_turn_ids` and repeats neither.
    Without a template the prompt stands alone.

    Args:
      prompt: the user's words; control tokens in them stay plain text.
      first: whether the conversation starts here.

    Returns:
      ids [T] int32, and own [T] bool: True where a token holds words of the
      user, False where it belongs to the template alone.

    Raises:
      McjaxError: the template fails or leaves out the user's words.
    """
    if not self.has_chat_template:
      ids = self.encode(prompt)
      return ids, np.ones(ids.shape, bool)
    before, after, trims = self._turn_frame(first)
    words = prompt.strip() if trims else prompt
    if not any(str(self._core.id_to_token(i)) in words
               for i in self.special_ids):
      return self._encode_framed(before, words, after)
    ids = [self._encode_template(before), self.encode(words)]
    ids.append(self._encode_template(after))
    own = [np.full(part.shape, i == 1) for i, part in enumerate(ids)]
    return np.concatenate(ids), np.concatenate(own)

  @functools.cached_property
  def end_of_turn_ids(self) -> np.ndarray:
    """Ids [T] int32 that close a generated answer; empty without a template.

    The first of them is usually the stop token that the model generates.
    """
    if not self.has_chat_template:
      return np.zeros((0,), np.int32)
    return self._encode_template(self._answer_tail())

  @functools.cached_property
  def answer_ids(self) -> np.ndarray:
    """Ids [T] int32 that open the model's answer; empty without a template."""
    if not self.has_chat_template:
      return np.zeros((0,), np.int32)
    return self._encode_template(self._turn_frame(first=False)[1])

  def _encode_template(self, text: str) -> np.ndarray:
    """Ids of template text, in which control tokens count as such."""
    with self._lock:
      self._core.encode_special_tokens = False
      ids = self._core.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, np.int32)

  def _encode_framed(self, before: str, words: str, after: str):
    """Ids of the whole turn, and which of them overlap the user's words."""
    with self._lock:
      self._core.encode_special_tokens = False
      encoded = self._core.encode(
        before + words + after, add_special_tokens=False
      )
    start, stop = len(before), len(before) + len(words)
    spans = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
    own = (spans[:, 0] < stop) & (spans[:, 1] > start)
    return np.asarray(encoded.ids, np.int32), own

  def _turn_frame(self, first: bool) -> tuple[str, str, bool]:
    """Template text before and after the user's words; whether it trims."""
    frames = []
    for words in (_USER, f" {_USER} "):
      messages = [{"role": "user", "content": words}]
      if not first:
        messages = [*_exchange(), *messages]
      text = self._render(messages, add_generation_prompt=True)
      if not first:
        text = text.rpartition(_ANSWER)[2].removeprefix(self._answer_tail())
      if text.count(_USER) != 1:
        raise McjaxError(
          "the chat template does not show the user's words once"
        )
      frames.append(text.split(_USER))
    (before, after), (spaced, _) = frames
    return before, after, before == spaced

  def _answer_tail(self) -> str:
    """What the template writes behind an answer that a turn may follow."""
    text = self._render(_exchange(), add_generation_prompt=False)
    _, answer, tail = text.rpartition(_ANSWER)
    if not answer:
      raise McjaxError("the chat template does not show the model's answer")
    return tail

  def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
    import jinja2

    try:
      return (
        _environment()
        .from_string(self._template)
        .render(
          messages=messages,
          add_generation_prompt=add_generation_prompt,
          tools=None,
          documents=None,
          **self._template_tokens,
        )
      )
    except jinja2.TemplateError as e:
      raise McjaxError(f"the model's chat template fails: {e}") from e


def _exchange() -> list[dict]:
  return [
    {"role": "user", "content": _EARLIER},
    {"role": "assistant", "content": _ANSWER},
  ]


@functools.cache
def _environment():
  """Jinja as chat templates expect it (transformers' settings)."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the model's words: rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def fail(message: str):
    raise jinja2.TemplateError(message)

  def tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = tojson
  functions: dict[str, Any] = environment.globals
  functions["raise_exception"] = fail
  functions["strftime_now"] = lambda form: (
    datetime.datetime.now().strftime(form))
  return environment


def _pieces(text: str) -> list[str]:
  """Cuts a text into pieces of about _CHUNK characters at safe places."""
  pieces, start = [], 0
  while len(text) - start > _CHUNK:
    cut = _CUT.search(text, start + _CHUNK)
    if cut is None:
      break
    pieces.append(text[start : cut.start()])
    start = cut.start()
  return [*pieces, text[start:]]


def _cuttable(core: tokenizers.Tokenizer, added: Iterable) -> bool:
  """Whether encoding the pieces of `_pieces` equals encoding the whole."""
  setup = json.loads(_without_vocabulary(core))
  pre = json.dumps(setup["pre_tokenizer"])
  normal = (setup["normalizer"] or {}).get("type")
  plain = '"ByteLevel"' in pre and '"add_prefix_space": true' not in pre
  loose = any(
    not t.special and (t.lstrip or t.rstrip or re.search(r"\s", t.content))
    for t in added
  )
  return plain and normal in (None, "NFC", "NFKC") and not loose


def _without_vocabulary(core: tokenizers.Tokenizer) -> str:
  """JSON of a tokenizer's normaliser and pre-tokenizer alone."""
  bare = tokenizers.Tokenizer(tokenizers.models.BPE())
  for part in ("normalizer", "pre_tokenizer"):
    if getattr(core, part) is not None:
      setattr(bare, part, getattr(core, part))
  return bare.to_str()


# --- Hugging Face folders ----------------------------------------------------


def _optional_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:
    raise McjaxError(f"{path.name} is not JSON: {e}") from e
  return value if isinstance(value, dict) else {}


def _folder_bos(core, settings: dict, names: dict[str, str]) -> int | None:
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


def _folder_template(folder: pathlib.Path, settings: dict) -> str | None:
  """chat_template.jinja, else the (default) entry of tokenizer_config."""
  path = folder / "chat_template.jinja"
  if path.is_file():
    return path.read_text(encoding="utf-8")
  template = settings.get("chat_template")
  if isinstance(template, list):
    named = {t.get("name"): t.get("template") for t in template}
    template = named.get("default")
  return template
