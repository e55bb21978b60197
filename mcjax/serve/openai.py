"""Requests and responses in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
import json
import time
from typing import Any
import uuid

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.runtime.results import Generation
from mcjax.types import McjaxError

_PLAIN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty",
          "seed")
# What this server cannot do, and the values that ask for nothing of it.
_REFUSED = {
  "tools": ([],), "functions": ([],), "logit_bias": ({},), "suffix": ("",),
  "echo": (False,), "presence_penalty": (0,), "frequency_penalty": (0,),
  "response_format": ({"type": "text"},), "n": (1,), "best_of": (1,),
  "modalities": (["text"],),
}
_ROLES = {"developer": "system", "system": "system", "user": "user",
          "assistant": "assistant"}


def settings(body: Mapping[str, Any], most: int) -> dict[str, Any]:
  """Keyword arguments of `MegaContext.generate`.

  Args:
    body: the request.
    most: tokens of an answer, where it asks for more or says nothing.

  Raises:
    McjaxError: a value of the wrong kind, or what is not supported.
  """
  for name, harmless in _REFUSED.items():
    if body.get(name) is not None and body[name] not in harmless:
      raise McjaxError(f"{name} is not supported")
  wanted = body.get("max_completion_tokens", body.get("max_tokens"))
  out = {name: body[name] for name in _PLAIN if body.get(name) is not None}
  out["max_new_tokens"] = most if wanted is None else wanted
  if type(out["max_new_tokens"]) is not int or out["max_new_tokens"] < 0:
    raise McjaxError(
      f"max_tokens must be a whole number >= 0, got {wanted!r:.80}")
  out["max_new_tokens"] = min(most, out["max_new_tokens"])
  out["stop"] = _stops(body.get("stop"))
  out["remember"] = bool(body.get("remember", True))
  return out | _listed(body.get("logprobs"), body.get("top_logprobs"))


def _stops(stop: Any) -> list[str]:
  if stop is None or isinstance(stop, str):
    return [stop] if stop else []
  if not isinstance(stop, list):
    raise McjaxError("stop must be a text or a list of texts")
  return stop


def _listed(logprobs: Any, top: Any) -> dict[str, Any]:
  """What the request asks to know about tokens, in either form."""
  if logprobs is None or isinstance(logprobs, bool):
    if top and not logprobs:
      raise McjaxError("top_logprobs needs logprobs")
    return {"logprobs": bool(logprobs), "top_logprobs": top or 0}
  return {"logprobs": True, "top_logprobs": logprobs}  # of a completion


def conversation(messages: Any) -> tuple[list[dict[str, str]], str | None]:
  """The messages of a request, and the system prompt that leads them.

  Raises:
    McjaxError: the messages are malformed, or nothing is asked.
  """
  if not isinstance(messages, list) or not messages:
    raise McjaxError("messages must be a list that is not empty")
  out = []
  for m in messages:
    role = m.get("role") if isinstance(m, Mapping) else None
    if role not in _ROLES:
      raise McjaxError("a message must have one of the roles "
                       f"{', '.join(sorted(_ROLES))}, got {role!r:.80}")
    out.append({"role": _ROLES[role], "content": _text(m.get("content"))})
  if out[-1]["role"] == "assistant":
    raise McjaxError("the last message is an answer already")
  system = None
  if out[0]["role"] == "system" and len(out) > 1:
    system = out.pop(0)["content"]
  return out, system


def unheard(messages: list[dict[str, str]]) -> list[dict[str, str]]:
  """Those that a history with a conversation does not hold yet.

  A client sends the whole conversation each time; what comes behind its last
  answer is new.
  """
  answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  return messages[answers[-1] + 1 :] if answers else messages


def _text(content: Any) -> str:
  if isinstance(content, list):  # parts
    kinds = {p.get("type") if isinstance(p, Mapping) else None
             for p in content}
    if kinds - {"text"}:
      raise McjaxError("a message's content must be text")
    content = "".join(str(p.get("text", "")) for p in content)
  if not isinstance(content, str) or not content:
    raise McjaxError("a message must have a content that is a text")
  return content


def envelope(kind: str, model: str) -> dict[str, Any]:
  """What a response and each of its chunks begin with."""
  return {"id": f"{kind}-{uuid.uuid4().hex}", "object": kind,
          "created": int(time.time()), "model": model}


def sources_of(out: Generation) -> dict[str, Any]:
  """The memory's part of a response."""
  return {"answerable": out.answerable, "sources": [
    vars(source) for source in out.sources]}


def usage(out: Generation) -> dict[str, int]:
  """Tokens of prompt and answer."""
  return {"prompt_tokens": out.prompt_tokens,
          "completion_tokens": len(out.token_ids),
          "total_tokens": out.prompt_tokens + len(out.token_ids)}


def choice(out: Generation, tokenizer: Tokenizer, chat: bool
           ) -> dict[str, Any]:
  """The one choice of a response."""
  head = {"index": 0, "finish_reason": out.stop_reason}
  if chat:
    return head | {"logprobs": chat_logprobs(out, tokenizer),
                   "message": {"role": "assistant", "content": out.text}}
  return head | {"logprobs": text_logprobs(out, tokenizer), "text": out.text}


def chat_logprobs(out: Generation, tokenizer: Tokenizer
                  ) -> dict[str, Any] | None:
  """What is known of each token, as chat completions tell it."""
  if out.logprobs is None:
    return None
  return {"refusal": None, "content": [
    {**_token(tokenizer, i, value), "top_logprobs": [
      _token(tokenizer, *other) for other in _beside(out, n)]}
    for n, (i, value) in enumerate(zip(out.token_ids, out.logprobs))]}


def text_logprobs(out: Generation, tokenizer: Tokenizer
                  ) -> dict[str, Any] | None:
  """The same as completions tell it."""
  if out.logprobs is None:
    return None
  pieces = [_token(tokenizer, i, 0.0)["token"] for i in out.token_ids]
  starts = np.cumsum([0, *map(len, pieces)])[:-1].tolist()
  beside = [
    {t["token"]: t["logprob"] for t in (
      _token(tokenizer, *other) for other in _beside(out, n))}
    for n in range(len(pieces))]
  return {"tokens": pieces, "token_logprobs": out.logprobs.tolist(),
          "text_offset": starts, "top_logprobs": beside}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float
           ) -> dict[str, Any]:
  raw = tokenizer.token_bytes(int(token_id))
  return {"token": raw.decode("utf-8", "replace"), "logprob": float(logprob),
          "bytes": list(raw)}


def _beside(out: Generation, at: int) -> list[tuple[int, float]]:
  """The likeliest tokens instead of token number `at`."""
  if out.likely is None:
    return []
  ids, values = (part[at].tolist() for part in out.likely)
  return list(zip(ids, values))


class Events:
  """The server-sent events of one streamed answer."""

  def __init__(self, head: dict[str, Any], with_usage: bool):
    """Args: head: see `envelope`. with_usage: whether a last one counts."""
    self._chat = head["object"] == "chat.completion"
    kind = "chat.completion.chunk" if self._chat else head["object"]
    self._head = {**head, "object": kind}
    self._usage = with_usage

  def begin(self) -> list[str]:
    """Says who speaks."""
    return [self._event({"delta": {"role": "assistant", "content": ""}})
            ] if self._chat else []

  def piece(self, text: str) -> str:
    """Says a piece of the answer."""
    return self._event(
      {"delta": {"content": text}} if self._chat else {"text": text})

  def end(self, out: Generation, tokenizer: Tokenizer) -> list[str]:
    """Says why it ended, what it was read from, and all about its tokens."""
    part: dict[str, Any] = {"finish_reason": out.stop_reason}
    if self._chat:
      part |= {"delta": {}, "logprobs": chat_logprobs(out, tokenizer)}
    else:
      part |= {"text": "", "logprobs": text_logprobs(out, tokenizer)}
    events = [self._event(part, mcjax=sources_of(out))]
    if self._usage:
      events.append(_data({**self._head, "choices": [], "usage": usage(out)}))
    return [*events, "data: [DONE]\n\n"]

  def _event(self, part: dict[str, Any], **more) -> str:
    choice = {"index": 0, "finish_reason": None, "logprobs": None, **part}
    return _data({**self._head, "choices": [choice], **more})


def failed_event(message: str, kind: str) -> str:
  """Tells of an error in mid-answer."""
  return _data(error(message, kind))


def _data(value: dict[str, Any]) -> str:
  return f"data: {json.dumps(value)}\n\n"


def error(message: str, kind: str = "invalid_request_error"
          ) -> dict[str, dict[str, str | None]]:
  """The body of a failed request."""
  return {"error": {"message": message, "type": kind, "param": None,
                    "code": None}}
