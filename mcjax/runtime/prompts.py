"""Prompts: what a turn puts into the history, and which of its words ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mcjax.answer import turns
from mcjax.base.tokenizer import Tokenizer
from mcjax.runtime.query import Query
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

Prompt = str | Sequence[Mapping[str, str]]
_QUESTION = 128  # newest words of a prompt that act as the query


class Turn(NamedTuple):
  """A prompt as the history takes it.

  Attributes:
    ids: [T] int32 to append.
    closing: ids that close the answer.
    query: what it asks.
  """

  ids: np.ndarray
  closing: np.ndarray
  query: Query


def checked_text(text: Any, name: str) -> str:
  """A text that is not empty. Raises: McjaxError."""
  if not isinstance(text, str):
    raise McjaxError(f"{name} must be a string, got {type(text).__name__}")
  if not text:
    raise McjaxError(f"{name} is empty: nothing was changed")
  return text


def messages_of(prompt: Any) -> Sequence[Mapping[str, str]]:
  """A prompt as messages. Raises: McjaxError where it is none."""
  if isinstance(prompt, str):
    return [{"role": "user", "content": checked_text(prompt, "prompt")}]
  if not isinstance(prompt, Sequence) or not prompt:
    raise McjaxError(
      f"prompt must be a string or messages, got {type(prompt).__name__}")
  for message in prompt:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(
        message):
      raise McjaxError(
        f"a message must have a role and a content, got {message!r}")
    checked_text(message["content"], "a message's content")
  return prompt


def checked_system(system: Any) -> str:
  """A system prompt, which may be empty. Raises: McjaxError."""
  return checked_text(system, "system") if system != "" else ""


def with_system(messages: Sequence[Mapping[str, str]], system: str
                ) -> Sequence[Mapping[str, str]]:
  """Messages behind a system prompt, unless they bring their own.

  Raises:
    McjaxError: the system prompt is no text.
  """
  told = [m for m in messages if m["role"] == "system"]
  if not checked_system(system) or told:
    return messages
  return [{"role": "system", "content": system}, *messages]


def turn(prompt: Prompt, tree: MegaContextTree, tokenizer: Tokenizer,
         template: bool) -> Turn:
  """A prompt behind the history of `tree`.

  Args:
    prompt: a text, or messages of which the last one is answered.
    tree: the history.
    tokenizer: of its base.
    template: whether the base's chat template is filled.

  Raises:
    McjaxError: the prompt is empty or malformed.
  """
  messages, cursor = messages_of(prompt), tree.cursor
  if template:
    chat = tokenizer.chat(messages, first=not cursor)
    ids, own = chat.ids, chat.owner == len(messages) - 1
    closing = np.asarray(tokenizer.end_of_turn_ids, np.int32)
    line = line_break(tree, tokenizer)
    ids = np.concatenate([line, ids])
    own = np.concatenate([np.zeros(len(line), bool), own])
    earlier = [i for i, m in enumerate(messages[:-1]) if m["role"] == "user"]
    before = (chat.ids[chat.owner == earlier[-1]] if earlier
              else turns.asked_before(tree, tokenizer))
  else:
    text = "\n\n".join(m["content"] for m in messages)
    ids = with_bos(tokenizer.encode(text), tree, tokenizer)
    own, closing = np.ones(len(ids), bool), np.zeros(0, np.int32)
    before = closing
  query = dataclasses.replace(
    _query(ids[own], own, tree, tokenizer), turn=template,
    before=before[-_QUESTION:])
  return Turn(ids, closing, query)


def _query(words: np.ndarray, own: np.ndarray, tree: MegaContextTree,
           tokenizer: Tokenizer) -> Query:
  """The words [Q] of a prompt, which are its tokens `own` [T] bool."""
  start = tree.cursor
  # A line break before the prompt is read with it.
  begin = start - _ends_a_line(tree, tokenizer)
  head = start - begin + int(np.argmax(own))
  if len(words) > _QUESTION:  # a pasted text with the question at its end
    words = words[-_QUESTION:]
    start += int(np.flatnonzero(own)[-_QUESTION])
  return Query(
    words, np.ones(len(words), np.float32), start, asked=True, prompt=begin,
    head=head)


def _ends_a_line(tree: MegaContextTree, tokenizer: Tokenizer) -> bool:
  """Whether the history ends with a line break."""
  last = tree.tokens(max(0, tree.cursor - 1), tree.cursor)
  return tokenizer.decode(last).endswith("\n")


def line_break(tree: MegaContextTree, tokenizer: Tokenizer) -> np.ndarray:
  """Ids between text of the history and a turn, which begins on a new line.

  None where one begins already, and behind another turn.
  """
  last = tree.tokens(max(0, tree.cursor - 1), tree.cursor).tolist()
  if (not last or last[0] in tokenizer.special_ids
      or _ends_a_line(tree, tokenizer)):
    return np.zeros(0, np.int32)
  return np.asarray(tokenizer.encode("\n"), np.int32)


def with_bos(ids: np.ndarray, tree: MegaContextTree, tokenizer: Tokenizer
             ) -> np.ndarray:
  """Ids behind the token that begins a history, where it is empty so far."""
  bos = tokenizer.bos_id
  if tree.cursor or bos is None:
    return ids
  return np.concatenate([np.array([bos], np.int32), ids])
