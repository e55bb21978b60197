"""The server's routes.

Answers run in threads; the engine decodes them together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
import dataclasses
import hmac
import importlib.resources
import json
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import (
  HTMLResponse,
  JSONResponse,
  PlainTextResponse,
  Response,
  StreamingResponse,
)
from starlette.routing import Route

from mcjax.runtime.results import Generation
from mcjax.serve import openai
from mcjax.serve.histories import Histories, UnknownHistory
from mcjax.serve.metrics import Metrics
from mcjax.types import McjaxError

_OPEN = ("/", "/health")  # need no key
_DEFAULT = "default"  # the history of requests that name none


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one server takes.

  Attributes:
    body_bytes: of a request.
    max_new_tokens: of an answer.
    at_once: answers and ingests at work or waiting; more are told to come
      back.
  """

  body_bytes: int = 32 << 20
  max_new_tokens: int = 1024
  at_once: int = 128


class _Left(Exception):
  """The client has left."""


class Server:
  """The routes over some histories."""

  def __init__(self, histories: Histories, key: str = "",
               limits: Limits = Limits()):
    """Args: key: that requests must bear; "" asks for none."""
    self._histories, self._key, self._limits = histories, key, limits
    self._metrics, self._busy = Metrics(), 0

  def app(self) -> Starlette:
    """The ASGI application; it commits and closes when it stops."""
    one = "/v1/histories/{name}"
    table: list[tuple[str, str, Callable]] = [
      ("POST", "/v1/chat/completions", self._chat),
      ("POST", "/v1/completions", self._completion),
      ("GET", "/v1/models", self._models),
      ("GET", "/v1/histories", self._list),
      ("POST", "/v1/histories", self._create),
      ("DELETE", one, self._delete),
      ("GET", one + "/documents", self._documents),
      ("POST", one + "/documents", self._ingest),
      ("DELETE", one + "/documents/{document:path}", self._forget),
      ("POST", one + "/search", self._search),
      ("GET", one + "/focus", self._focus),
      ("GET", "/metrics", self._read_metrics),
      ("GET", "/health", self._health),
      ("GET", "/", self._page),
    ]
    return Starlette(routes=[
      Route(path, self._guarded(path, call), methods=[method])
      for method, path, call in table])

  def close(self) -> None:
    """Commits and closes every history, answers at work included."""
    self._histories.close()

  def _guarded(self, path: str, call: Callable) -> Callable:
    """A route with key, limits, errors in one line, and counting."""

    async def guarded(request: Request) -> Response:
      response = await self._answered(path, call, request)
      self._metrics.request(path, response.status_code)
      return response

    return guarded

  async def _answered(self, path: str, call: Callable, request: Request
                      ) -> Response:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if self._key and path not in _OPEN and not hmac.compare_digest(
        given.encode(), self._key.encode()):
      return _failed(401, "the API key is missing or wrong",
                     "authentication_error")
    if int(request.headers.get("content-length") or 0) > (
        self._limits.body_bytes):
      return _failed(413, f"more than {self._limits.body_bytes} bytes")
    if self._busy >= self._limits.at_once and request.method == "POST":
      return _failed(429, "too many requests at once: try again",
                     "rate_limit_error")
    try:
      return await call(request)
    except UnknownHistory as error:
      return _failed(404, str(error))
    except McjaxError as error:
      return _failed(400, str(error))

  # --- answers ------------------------------------------------------------

  async def _chat(self, request: Request) -> Response:
    body = await self._body(request)
    messages = openai.new_messages(body.get("messages"))

    def prompt(mc):
      # What was said once is remembered; a system message begins a history.
      system = mc.cursor and messages[0]["role"] == "system"
      return messages[1:] if system and len(messages) > 1 else messages

    return await self._generated(request, body, "chat.completion", prompt)

  async def _completion(self, request: Request) -> Response:
    body = await self._body(request)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
      prompt = prompt[0]
    if not isinstance(prompt, str):
      raise McjaxError("prompt must be one text")
    return await self._generated(
      request, body, "text_completion", lambda mc: prompt, template=False)

  async def _generated(self, request: Request, body: dict, kind: str,
                       prompt: Callable, **more) -> Response:
    settings = openai.settings(body, self._limits.max_new_tokens) | more
    name = request.headers.get("x-mcjax-history") or body.get("user") or (
      _DEFAULT)
    head = openai.envelope(kind, self._model)

    def work(on_piece=None) -> Generation:
      with self._histories.use(name, create=True) as mc:
        out = mc.generate(prompt(mc), on_piece=on_piece, **settings)
      self._metrics.answer(
        out.prompt_tokens, len(out.token_ids), out.first_token_seconds)
      return out

    if body.get("stream"):
      return StreamingResponse(
        self._stream(head, work), media_type="text/event-stream")
    out = await self._threaded(work)
    choice = openai.chat_choice(out, self._tokenizer)
    if kind == "text_completion":
      choice = {"index": 0, "text": out.text, "logprobs": None,
                "finish_reason": out.stop_reason}
    return JSONResponse({**head, "choices": [choice], "usage": openai.usage(
      out), "mcjax": openai.sources_of(out)})

  async def _stream(self, head: dict, work: Callable) -> AsyncIterator[str]:
    """Server-sent events; a client that leaves ends the answer."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue()
    chat, left = head["object"] == "chat.completion", False
    head = {**head, "object": "chat.completion.chunk"} if chat else head

    def on_piece(piece: str) -> None:
      loop.call_soon_threadsafe(events.put_nowait, piece)
      if left:
        raise _Left

    def event(piece: str, reason: str | None = None, **more) -> str:
      part: dict[str, Any] = {"text": piece}
      if chat:
        part = {"delta": {"content": piece} if reason is None else {}}
      choice = {"index": 0, "finish_reason": reason, "logprobs": None, **part}
      return f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n"

    answer = asyncio.ensure_future(self._threaded(lambda: work(on_piece)))

    def ended(done: asyncio.Future) -> None:
      if not done.cancelled():
        done.exception()  # looked at, also where the client has left
      events.put_nowait(None)

    answer.add_done_callback(ended)
    try:
      while (piece := await events.get()) is not None:
        yield event(piece)
      out = answer.result()
      yield event("", out.stop_reason, mcjax=openai.sources_of(out))
      yield "data: [DONE]\n\n"
    except McjaxError as error:
      yield f"data: {json.dumps(openai.error(str(error)))}\n\n"
    finally:
      left = True

  async def _threaded(self, work: Callable):
    self._busy += 1
    try:
      return await run_in_threadpool(work)
    finally:
      self._busy -= 1

  # --- histories ----------------------------------------------------------

  async def _list(self, request: Request) -> Response:
    del request
    names = await run_in_threadpool(self._histories.names)
    return JSONResponse({"object": "list", "data": [{"id": n} for n in names]})

  async def _create(self, request: Request) -> Response:
    name = (await self._body(request)).get("name") or ""
    return await self._with(
      name, lambda mc: {"id": name, "tokens": mc.cursor}, create=True)

  async def _delete(self, request: Request) -> Response:
    name = request.path_params["name"]
    await run_in_threadpool(self._histories.delete, name)
    return JSONResponse({"id": name, "deleted": True})

  async def _documents(self, request: Request) -> Response:
    return await self._with(request.path_params["name"], lambda mc: {
      "data": [dataclasses.asdict(d) for d in mc.documents()]})

  async def _ingest(self, request: Request) -> Response:
    body = await self._body(request)

    def work(mc) -> dict:
      stats = mc.ingest(body.get("text"), name=body.get("name"),
                        metadata=body.get("metadata"))
      return dataclasses.asdict(stats)

    return await self._with(request.path_params["name"], work, create=True)

  async def _forget(self, request: Request) -> Response:
    document = request.path_params["document"]
    return await self._with(request.path_params["name"], lambda mc: {
      "forgotten": [dataclasses.asdict(d) for d in mc.forget(document)]})

  async def _search(self, request: Request) -> Response:
    body = await self._body(request)
    return await self._with(request.path_params["name"], lambda mc: {
      "data": [dataclasses.asdict(s) for s in mc.search(
        body.get("query"), body.get("k", 5))]})

  async def _focus(self, request: Request) -> Response:
    return await self._with(request.path_params["name"], lambda mc: {
      "cursor": mc.cursor, "window": mc.config.window,
      "entries": [list(e) for e in mc.focus()]})

  async def _with(self, name: str, work: Callable, create: bool = False
                  ) -> Response:
    def run():
      with self._histories.use(name, create) as mc:
        return work(mc)

    return JSONResponse(await self._threaded(run))

  # --- the server itself --------------------------------------------------

  async def _models(self, request: Request) -> Response:
    del request
    return JSONResponse({"object": "list", "data": [
      {"id": self._model, "object": "model", "created": 0,
       "owned_by": "mcjax"}]})

  async def _health(self, request: Request) -> Response:
    del request
    return JSONResponse({"status": "ok"})

  async def _read_metrics(self, request: Request) -> Response:
    del request
    engine = self._histories.engine
    return PlainTextResponse(self._metrics.text(
      histories_open=len(engine.histories), requests_busy=self._busy,
      blocks_decoded=engine.blocks, rows_decoded=engine.rows))

  async def _page(self, request: Request) -> Response:
    del request
    page = importlib.resources.files("mcjax.serve") / "page.html"
    return HTMLResponse(page.read_text(encoding="utf-8"))

  async def _body(self, request: Request) -> dict:
    try:
      body = await request.json()
    except ValueError:
      raise McjaxError("the request is not JSON") from None
    if not isinstance(body, dict):
      raise McjaxError("the request is not a JSON object")
    return body

  @property
  def _model(self) -> str:
    return self._histories.engine.lm.name

  @property
  def _tokenizer(self):
    return self._histories.engine.lm.tokenizer


def _failed(status: int, message: str, kind: str = "invalid_request_error"
            ) -> Response:
  return JSONResponse(openai.error(message, kind), status)
