"""Requests and responses in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
import time
from typing import Any
import uuid

from mcjax.base.tokenizer import Tokenizer
from mcjax.runtime.results import Generation
from mcjax.types import McjaxError

_PLAIN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty",
          "seed")


def settings(body: Mapping[str, Any], most: int) -> dict[str, Any]:
  """Keyword arguments of `MegaContext.generate`.

  Raises:
    McjaxError: a value of the wrong kind, or what is not supported.
  """
  if body.get("n", 1) != 1:
    raise McjaxError("n must be 1: a history goes on in one way")
  if body.get("tools"):
    raise McjaxError("tools are not supported")
  wanted = body.get("max_completion_tokens", body.get("max_tokens"))
  out = {name: body[name] for name in _PLAIN if body.get(name) is not None}
  out["max_new_tokens"] = min(most, most if wanted is None else wanted)
  stop = body.get("stop") or ()
  out["stop"] = [stop] if isinstance(stop, str) else list(stop)
  out["logprobs"] = bool(body.get("logprobs"))
  out["remember"] = bool(body.get("remember", True))
  return out


def new_messages(messages: Any) -> list[dict[str, str]]:
  """Those of a conversation that the history does not hold yet.

  A client sends the whole conversation each time; what comes behind its last
  answer is new. A system message counts in the first request only.

  Raises:
    McjaxError: the messages are malformed.
  """
  if not isinstance(messages, list) or not messages:
    raise McjaxError("messages must be a list that is not empty")
  out = []
  for m in messages:
    if not isinstance(m, Mapping) or not isinstance(m.get("role"), str):
      raise McjaxError(f"a message must have a role, got {m!r:.80}")
    out.append({"role": m["role"], "content": _text(m.get("content"))})
  answers = [i for i, m in enumerate(out) if m["role"] == "assistant"]
  return out[answers[-1] + 1 :] if answers else out


def _text(content: Any) -> str:
  if isinstance(content, list):  # parts
    content = "".join(p.get("text", "") for p in content
                      if isinstance(p, Mapping))
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


def chat_choice(out: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
  """The one choice of a chat completion."""
  logprobs = None
  if out.logprobs is not None:
    logprobs = {"refusal": None, "content": [
      {"token": piece, "logprob": float(value), "top_logprobs": [],
       "bytes": list(piece.encode())}
      for piece, value in zip(tokenizer.pieces(out.token_ids), out.logprobs)]}
  return {"index": 0, "finish_reason": out.stop_reason, "logprobs": logprobs,
          "message": {"role": "assistant", "content": out.text}}


def error(message: str, kind: str = "invalid_request_error"
          ) -> dict[str, dict[str, str | None]]:
  """The body of a failed request."""
  return {"error": {"message": message, "type": kind, "param": None,
                    "code": None}}
