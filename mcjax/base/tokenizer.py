"""The base LM's tokenizer: text to ids, ids to text, turns of a chat.

Wraps a fast Hugging Face tokenizer, read from tokenizer.json or rebuilt from
GGUF metadata, and renders the model's own chat template. Only a folder without
tokenizer.json needs transformers; PyTorch is never imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import functools
import hashlib
import json
import pathlib
import re
import threading
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from mcjax.base import (
  files,
  gguf_vocabulary,
  tokenizer_folder,
  tokenizer_text,
)
from mcjax.base.chat_template import (
  Ending,
  alternate,
  chat_template,
  checked_messages,
)
from mcjax.base.gguf_file import GgufFile
from mcjax.types import McjaxError

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


class Chat(NamedTuple):
  """A conversation as the model reads it.

  Attributes:
    ids: [T] int32.
    owner: [T] int32, the number of the message whose words a token holds; -1
      where it belongs to the template alone.
  """

  ids: np.ndarray
  owner: np.ndarray


class Tokenizer:
  """A base LM's tokenizer.

  Attributes:
    vocab_size: 1 + the largest id.
    bos_id: id that belongs before the first token of a text, or None if this
      tokenizer adds none. `encode` never adds it.
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
    self._template_tokens = {
      k: v for k, v in (template_tokens or {}).items() if isinstance(v, str)}
    if not isinstance(template, str | None):
      raise McjaxError("the chat template is not a text")
    names = tuple(sorted(self._template_tokens.items()))
    self._template = chat_template(template or "", names)
    self._vocab = core.get_vocab(with_added_tokens=True)
    added = core.get_added_tokens_decoder()
    self._cuttable = tokenizer_text.is_cuttable(core, added.values())
    if not self._vocab:
      raise McjaxError("the tokenizer has no tokens")
    self.vocab_size = 1 + max(self._vocab.values())
    self.special_ids = frozenset(i for i, t in added.items() if t.special)
    self.bos_id = bos_id
    ends = {self._vocab[t] for t in _ENDS if t in self._vocab}
    self._added = frozenset(added)
    self._stops = {int(i) for i in stop_ids} | (ends & self.special_ids)
    self.has_chat_template = template is not None

  @classmethod
  def from_folder(cls, folder: pathlib.Path) -> Tokenizer:
    """Reads tokenizer.json and its companions in a Hugging Face folder.

    Raises:
      McjaxError: no tokenizer that can be read is there, or a malformed one.
    """
    core = tokenizer_folder.read_core(folder)
    settings = files.optional_json(folder / "tokenizer_config.json")
    settings["chat_template"] = tokenizer_folder.folder_template(
      folder, settings)
    stops: list = []
    for file in ("config.json", "generation_config.json"):
      ids = files.optional_json(folder / file).get("eos_token_id")
      stops += ids if isinstance(ids, list) else [ids]
    return cls._of(core, settings, stops)

  @classmethod
  def from_parts(cls, core: str, settings: Mapping[str, Any],
                 stop_ids: Iterable[int | None]) -> Tokenizer:
    """As `from_folder`, of what the files would hold.

    Args:
      core: of tokenizer.json.
      settings: of tokenizer_config.json, its chat template among them.
      stop_ids: end-of-text ids.

    Raises:
      McjaxError: malformed.
    """
    return cls._of(tokenizer_folder.core_of(core), settings, stop_ids)

  @classmethod
  def _of(cls, core: tokenizers.Tokenizer, settings: Mapping[str, Any],
          stop_ids: Iterable[int | None]) -> Tokenizer:
    names: dict[str, Any] = {
      key: value.get("content") if isinstance(value, dict) else value
      for key, value in settings.items()
      if key.endswith("_token") and isinstance(value, (str, dict))
    }
    stops = [core.token_to_id(names.get("eos_token") or ""), *stop_ids]
    return cls(
      core,
      bos_id=tokenizer_folder.folder_bos(core, settings, names),
      stop_ids=[i for i in stops if i is not None],
      template=settings.get("chat_template"),
      template_tokens=names,
    )

  @classmethod
  def from_gguf(cls, file: GgufFile) -> Tokenizer:
    """Rebuilds the tokenizer that a GGUF file describes.

    Args:
      file: an open GGUF file.

    Raises:
      McjaxError: the file has no tokenizer, or one of an unknown kind.
    """
    parts = gguf_vocabulary.read(file)
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
    pieces = tokenizer_text.pieces_of(text) if self._cuttable else [text]
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

  def token_bytes(self, token_id: int) -> bytes:
    """The UTF-8 bytes that a token adds to text; may end within a character."""
    piece = self._core.id_to_token(token_id) or ""
    if self._is_byte_level:
      known = tokenizer_text.byte_alphabet()
      if all(character in known for character in piece):
        return bytes(known[character] for character in piece)
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
      return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode("utf-8", "replace")

  @functools.cached_property
  def _is_byte_level(self) -> bool:
    """Whether the vocabulary spells bytes as characters (GPT-2's way)."""
    return self._core.token_to_id("\u0120") is not None

  def vocabulary_digest(self) -> bytes:
    """SHA-256 of the tokens in the order of their ids."""
    text = json.dumps(
      [sorted((i, t) for t, i in self._vocab.items()), sorted(self.special_ids)]
    )
    return hashlib.sha256(text.encode()).digest()

  def largest_text_id(self) -> int:
    """The largest id that `encode` can give."""
    text = (i for i in self._vocab.values() if i not in self.special_ids)
    return max(text, default=-1)

  # --- Chat ------------------------------------------------------------------

  def chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    first: bool = True,
    add_generation_prompt: bool = True,
  ) -> Chat:
    """Ids of a conversation, and whose words each of them holds.

    The first turn of a conversation carries whatever the template puts in
    front: its default system prompt and the BOS token, if it writes them.
    Messages with `first=False` stand behind `end_of_turn_ids` and repeat
    neither; where they begin with a system message, it is written as at the
    start of a conversation. A template without a place for a system message
    gets its words in front of the first user's, a blank line between. Without
    a template the words stand alone, blank lines between the messages.

    Args:
      messages: {"role": "system" | "user" | "assistant" | …, "content": text}
        in order; control tokens in a content stay plain text.
      first: whether the conversation starts here.
      add_generation_prompt: whether the model's next answer is opened.

    Raises:
      McjaxError: a message is malformed, the template fails, refuses the
        order of the roles, or leaves out words.
    """
    roles, words = checked_messages(messages)
    if not self.has_chat_template:
      blanks = ["", *["\n\n"] * (len(words) - 1)]
      return self._joined(alternate(words, blanks))
    try:
      parts = self._laid_out(roles, words, first, add_generation_prompt)
    except McjaxError:
      if roles[:2] != ("system", "user"):
        raise
      head, *rest = self._laid_out(
        roles[1:], words[1:], first, add_generation_prompt)
      rest = [(text, owner + 1 if owner >= 0 else -1) for text, owner in rest]
      parts = [head, (words[0].strip(), 0), ("\n\n", -1), *rest]
    return self._joined(parts)

  def chat_turn(
    self, prompt: str, first: bool
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a user's turn and of the opening of the model's answer.

    See `chat`, of which this is the case of one message by the user.

    Returns:
      ids [T] int32, and own [T] bool: True where a token holds words of the
      user, False where it belongs to the template alone.
    """
    turn = self.chat([{"role": "user", "content": prompt}], first=first)
    return turn.ids, turn.owner == 0

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end a generated answer, ascending.

    The end-of-text ids of the model, and whichever token its chat template
    writes behind an answer: where it closes none, the marker of the next turn.
    """
    return tuple(sorted(self._stops | set(self._turn_ends)))

  @property
  def stop_texts(self) -> tuple[str, ...]:
    """Texts that end a generated answer where no single token does."""
    if not self.has_chat_template or self._turn_ends:
      return ()
    ending = self._ending()
    if ending is None or not ending.passed.strip():
      return ()
    return (ending.closed.strip() or ending.passed.rstrip(),)

  @functools.cached_property
  def _turn_ends(self) -> tuple[int, ...]:
    """Tokens of the template's own that stand first behind an answer."""
    ending = self._ending()
    found = []
    for text in (ending.passed, ending.last) if ending else ():
      ids = self._encode_template(text.lstrip())[:1].tolist()
      found += [i for i in ids if i in self._added]
    return tuple(found)

  def _ending(self) -> Ending | None:
    """How the template ends an answer; None where it cannot be rendered."""
    if not self.has_chat_template:
      return None
    try:
      return self._template.ending()
    except McjaxError:
      return None  # told when a turn is asked for; other uses need no template

  @functools.cached_property
  def end_of_turn_ids(self) -> np.ndarray:
    """Ids [T] int32 that close a generated answer; empty without a template.

    The first of them is usually the stop token that the model generates.
    """
    if not self.has_chat_template:
      return np.zeros((0,), np.int32)
    return self._encode_template(self._template.ending().closed)

  @functools.cached_property
  def question_ids(self) -> np.ndarray:
    """Ids [T] int32 that open a later user's turn; empty without a template."""
    if not self.has_chat_template:
      return np.zeros((0,), np.int32)
    layout = self._template.later(("user",), True)
    return self._encode_template(layout.pieces[0])

  @functools.cached_property
  def answer_ids(self) -> np.ndarray:
    """Ids [T] int32 that open the model's answer; empty without a template."""
    if not self.has_chat_template:
      return np.zeros((0,), np.int32)
    layout = self._template.later(("user",), True)
    return self._encode_template(layout.pieces[1])

  def _laid_out(self, roles, words, first: bool, opening: bool) -> list[tuple]:
    """(text, owner) of the template's pieces and the words between them."""
    if first or roles[0] == "system":
      pieces, trims = self._template.layout(roles, opening)
      if not first:
        bos = self._template_tokens.get("bos_token")
        pieces = (pieces[0].removeprefix(bos or ""), *pieces[1:])
    else:
      pieces, trims = self._template.later(roles, opening)
    trimmed = []
    for text, (before, behind) in zip(words, trims, strict=True):
      text = text.lstrip() if before else text
      trimmed.append(text.rstrip() if behind else text)
    return [*alternate(trimmed, pieces), (pieces[-1], -1)]

  def _joined(self, parts: list[tuple[str, int]]) -> Chat:
    """Ids of texts one after another, and the owner of each token.

    Encoded as one text, like a template's rendering; but where words of a
    message look like control tokens, each part by itself.
    """
    controls = [str(self._core.id_to_token(i)) for i in self.special_ids]
    if any(owner >= 0 and any(c in text for c in controls)
           for text, owner in parts):
      ids = [self._encode_template(text) if owner < 0 else self.encode(text)
             for text, owner in parts]
      owners = [np.full(len(i), owner, np.int32)
                for i, (_, owner) in zip(ids, parts, strict=True)]
      return Chat(np.concatenate(ids), np.concatenate(owners))
    with self._lock:
      self._core.encode_special_tokens = False
      encoded = self._core.encode(
        "".join(text for text, _ in parts), add_special_tokens=False)
    spans = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
    owner, start = np.full(len(spans), -1, np.int32), 0
    for text, whose in parts:
      stop = start + len(text)
      if whose >= 0:
        owner[(spans[:, 0] < stop) & (spans[:, 1] > start)] = whose
      start = stop
    return Chat(np.asarray(encoded.ids, np.int32), owner)

  def _encode_template(self, text: str) -> np.ndarray:
    """Ids of template text, in which control tokens count as such."""
    with self._lock:
      self._core.encode_special_tokens = False
      ids = self._core.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, np.int32)
