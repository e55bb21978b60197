"""The server's routes.

Answers run in threads of their own; the engine decodes them together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent import futures
import contextlib
import dataclasses
import importlib.resources

from absl import logging
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
  HTMLResponse,
  JSONResponse,
  PlainTextResponse,
  Response,
  StreamingResponse,
)
from starlette.routing import Route

from mcjax.runtime.megacontext import MegaContext
from mcjax.runtime.results import Generation
from mcjax.serve import openai
from mcjax.serve.guard import Guard, Limits, Refused
from mcjax.serve.histories import Histories, HistoriesBusy, UnknownHistory
from mcjax.serve.metrics import Metrics
from mcjax.types import McjaxError

_DEFAULT = "default"  # the history of requests that name none
_GLANCE = 0.5  # seconds between looks whether a client is still there
_STOPPING = "the server is stopping; nothing of this request was kept"


class _Left(Exception):
  """The client has left, or the server is stopping."""


def _needed(body: dict, field: str):
  """A field of a body. Raises: McjaxError if it is not there."""
  if field not in body:
    raise McjaxError(f"{field} is missing; the body has "
                     f"{', '.join(body) or 'no field'}"[:200])
  return body[field]


class _Call:
  """One request at work, which its client may give up.

  Attributes:
    left: nobody waits for it any more.
  """

  def __init__(self, guard: Guard):
    self.left = False
    self._guard = guard

  def check(self, *_) -> None:
    """Called between steps of the work. Raises: _Left."""
    if self.left or self._guard.stopping:
      raise _Left(_STOPPING)


class Server:
  """The routes over some histories."""

  def __init__(self, histories: Histories, key: str = "",
               limits: Limits | None = None):
    """Args: key: that requests must bear; "" asks for none."""
    self._histories, self._limits = histories, limits or Limits()
    self._metrics, self._guard = Metrics(), Guard(key, self._limits)
    # As many threads as requests can be at work, and some that only look.
    self._threads = futures.ThreadPoolExecutor(
      self._limits.at_once + 16, "mcjax-serve")

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
    return Starlette(lifespan=self._lifespan, routes=[
      Route(path, self._guarded(path, call), methods=[method])
      for method, path, call in table])

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    del app
    yield
    self.stop()
    await asyncio.get_running_loop().run_in_executor(None, self.close)

  def stop(self) -> None:
    """Lets nothing new in, and ends what is at work: a streamed answer with
    its turn closed, all else as if it had not been asked for."""
    self._guard.stopping = True

  def close(self) -> None:
    """Commits and closes every history, answers at work included."""
    self.stop()
    self._threads.shutdown(wait=True)
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
    try:
      self._guard.check(request, path)
      return await call(request)
    except Refused as refused:
      return refused.response
    except _Left as left:
      return Refused(503, str(left), "server_error").response
    except UnknownHistory as error:
      return Refused(404, str(error)).response
    except HistoriesBusy as error:
      return Refused(503, str(error), "server_error", retry_after="1").response
    except McjaxError as error:
      return Refused(400, str(error)).response
    except Exception:
      logging.exception("%s %s", request.method, request.url.path)
      return Refused(500, "the server failed; its log says why",
                     "server_error").response

  # --- answers ------------------------------------------------------------

  async def _chat(self, request: Request) -> Response:
    body = await self._guard.body(request)
    messages, system = openai.conversation(body.get("messages"))

    def prompt(mc):
      # What was said once is remembered.
      return openai.unheard(messages) if mc.cursor else messages

    return await self._generated(
      request, body, "chat.completion", prompt, system=system)

  async def _completion(self, request: Request) -> Response:
    body = await self._guard.body(request)
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
    head, call = openai.envelope(kind, self._model), _Call(self._guard)

    def work(**listeners) -> Generation:
      with self._asked(name, settings["remember"]) as mc:
        call.check()
        out = mc.generate(prompt(mc), **listeners, **settings)
      self._metrics.answer(
        out.prompt_tokens, len(out.token_ids), out.first_token_seconds)
      return out

    if body.get("stream"):
      told = (body.get("stream_options") or {}).get("include_usage")
      events = openai.Events(head, bool(told))
      return await self._streamed(request, events, call, work)
    done = asyncio.ensure_future(
      self._threaded(lambda: work(on_text=call.check)))
    await self._come(done, request, call)
    out = done.result()
    choice = openai.choice(out, self._tokenizer, kind == "chat.completion")
    return JSONResponse({**head, "choices": [choice], "usage": openai.usage(
      out), "mcjax": openai.sources_of(out)})

  def _asked(self, name: str, remember: bool
             ) -> contextlib.AbstractContextManager[MegaContext]:
    """The history that is asked; one that is not there leaves no trace if it
    is not to remember."""
    if remember or self._histories.exists(name):
      return self._histories.use(name, create=True)
    return self._histories.passing()

  async def _streamed(self, request: Request, events: openai.Events,
                      call: _Call, work: Callable) -> Response:
    """Server-sent events, once the answer has begun or has failed."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

    def on_piece(piece: str) -> None:
      loop.call_soon_threadsafe(pieces.put_nowait, piece)
      call.check()

    answer = asyncio.ensure_future(
      self._threaded(lambda: work(on_piece=on_piece)))

    def ended(done: asyncio.Future) -> None:
      if not done.cancelled():
        done.exception()  # looked at, also where the client has left
      pieces.put_nowait(None)

    answer.add_done_callback(ended)
    first = asyncio.ensure_future(pieces.get())
    await self._come(first, request, call)
    if first.result() is None:
      answer.result()  # what has failed by now is told by the status
    return StreamingResponse(
      self._events(events, call, answer, pieces, first.result()),
      media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

  async def _events(self, events: openai.Events, call: _Call,
                    answer: asyncio.Future, pieces: asyncio.Queue,
                    piece: str | None) -> AsyncIterator[str]:
    """The events from the first piece on; None stands for the end."""
    try:
      for event in events.begin():
        yield event
      while piece is not None:
        yield events.piece(piece)
        piece = await pieces.get()
      for event in events.end(answer.result(), self._tokenizer):
        yield event
    except _Left:
      yield openai.failed_event(
        "the server is stopping; what was said is kept", "server_error")
    except Exception:
      logging.exception("a streamed answer")
      yield openai.failed_event(
        "the server failed; its log says why", "server_error")
    finally:
      call.left = True  # a client that leaves ends the answer

  async def _come(self, future: asyncio.Future, request: Request, call: _Call
                  ) -> None:
    """Waits for a future; the call is given up when its client leaves."""
    try:
      while not future.done():
        await asyncio.wait([future], timeout=_GLANCE)
        call.left = await request.is_disconnected()
    except BaseException:
      call.left = True
      raise

  async def _threaded(self, work: Callable):
    with self._guard.place():
      return await asyncio.get_running_loop().run_in_executor(
        self._threads, work)

  # --- histories ----------------------------------------------------------

  async def _list(self, request: Request) -> Response:
    del request
    names = await self._looked_up(self._histories.names)
    return JSONResponse({"object": "list", "data": [{"id": n} for n in names]})

  async def _create(self, request: Request) -> Response:
    name = (await self._guard.body(request)).get("name") or ""
    return await self._with(
      name, lambda mc: {"id": name, "tokens": mc.cursor}, create=True)

  async def _delete(self, request: Request) -> Response:
    name = request.path_params["name"]
    await self._looked_up(self._histories.delete, name)
    return JSONResponse({"id": name, "deleted": True})

  async def _documents(self, request: Request) -> Response:
    return await self._with(request.path_params["name"], lambda mc: {
      "data": [dataclasses.asdict(d) for d in mc.documents()]})

  async def _ingest(self, request: Request) -> Response:
    body = await self._guard.body(request)
    text = _needed(body, "text")
    call = _Call(self._guard)

    def work(mc) -> dict:
      stats = mc.ingest(text, call.check, name=body.get("name"),
                        metadata=body.get("metadata"))
      return dataclasses.asdict(stats)

    return await self._with(request.path_params["name"], work, create=True)

  async def _forget(self, request: Request) -> Response:
    document = request.path_params["document"]
    return await self._with(request.path_params["name"], lambda mc: {
      "forgotten": [dataclasses.asdict(d) for d in mc.forget(document)]})

  async def _search(self, request: Request) -> Response:
    body = await self._guard.body(request)
    query = _needed(body, "query")
    return await self._with(request.path_params["name"], lambda mc: {
      "data": [dataclasses.asdict(s) for s in mc.search(
        query, body.get("k", 5))]})

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

  async def _looked_up(self, work: Callable, *args):
    """As `_threaded`, for what is quick and waits for nobody."""
    return await asyncio.get_running_loop().run_in_executor(
      self._threads, work, *args)

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
    spliced, runs = engine.spliced
    return PlainTextResponse(self._metrics.text(
      histories_open=len(engine.histories), requests_busy=self._guard.busy,
      blocks_decoded=engine.blocks, rows_decoded=engine.rows,
      splices=spliced, splice_runs=runs))

  async def _page(self, request: Request) -> Response:
    del request
    page = importlib.resources.files("mcjax.serve") / "page.html"
    return HTMLResponse(page.read_text(encoding="utf-8"))

  @property
  def _model(self) -> str:
    return self._histories.engine.lm.name

  @property
  def _tokenizer(self):
    return self._histories.engine.lm.tokenizer
