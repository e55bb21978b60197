"""Who is let in: keys, sizes, rates, and how many at once."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import hmac
import json
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mcjax.serve import openai
from mcjax.types import McjaxError

OPEN = ("/", "/health")  # need no key
_MOST_CLIENTS = 4096  # whose rates are remembered


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one server takes.

  Attributes:
    body_bytes: of a request.
    max_new_tokens: of an answer.
    at_once: answers and ingests at work or waiting; more are told to come
      back.
    requests_per_minute: of one client, by key and address; 0 is any number.
    wait_seconds: that a request may wait for a free history.
  """

  body_bytes: int = 32 << 20
  max_new_tokens: int = 1024
  at_once: int = 128
  requests_per_minute: int = 0
  wait_seconds: float = 600.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0
      if field.name != "requests_per_minute":
        least = 1
      if value < least:
        raise McjaxError(f"limits.{field.name} must be >= {least}, got {value}")


class Refused(Exception):
  """A request that is answered with an error.

  Attributes:
    response: that answer.
  """

  def __init__(self, status: int, message: str,
               kind: str = "invalid_request_error", **headers: str):
    super().__init__(message)
    self.response: Response = JSONResponse(
      openai.error(message, kind), status,
      headers={k.replace("_", "-"): v for k, v in headers.items()})


class Guard:
  """Lets requests in, or raises `Refused`.

  Attributes:
    busy: answers and ingests at work or waiting.
    stopping: nothing new is let in.
  """

  def __init__(self, key: str, limits: Limits):
    """Args: key: that requests must bear; "" asks for none."""
    self.busy, self.stopping = 0, False
    self._key, self._limits = key, limits
    self._allowances: dict[tuple[str, str], tuple[float, float]] = {}

  def check(self, request: Request, path: str) -> None:
    """Checks what stands in front of the body."""
    if path in OPEN:
      return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if self._key and not hmac.compare_digest(
        given.encode(), self._key.encode()):
      raise Refused(401, "the API key is missing or wrong",
                    "authentication_error")
    if self.stopping:
      raise Refused(503, "the server is stopping", "server_error")
    client = request.client.host if request.client else ""
    self._spend((given, client))
    self._check_size(request.headers.get("content-length", "0"))

  def _check_size(self, told: str) -> None:
    if not told.isdecimal():
      raise Refused(400, "content-length is no number")
    if int(told) > self._limits.body_bytes:
      raise Refused(413, f"more than {self._limits.body_bytes} bytes")

  def _spend(self, client: tuple[str, str]) -> None:
    """Takes a request from a client's allowance, which refills with time."""
    most = self._limits.requests_per_minute
    if not most:
      return
    now = time.monotonic()
    left, then = self._allowances.pop(client, (float(most), now))
    left = min(most, left + (now - then) * most / 60)
    enough = left >= 1
    self._allowances[client] = (left - enough, now)
    if len(self._allowances) > _MOST_CLIENTS:  # the one silent for longest
      del self._allowances[next(iter(self._allowances))]
    if not enough:
      seconds = int((1 - left) * 60 / most) + 1
      raise Refused(429, f"more than {most} requests a minute",
                    "rate_limit_error", retry_after=str(seconds))

  @contextlib.contextmanager
  def place(self) -> Iterator[None]:
    """A place among those at work."""
    if self.busy >= self._limits.at_once:
      raise Refused(429, "too many requests at once: try again",
                    "rate_limit_error", retry_after="1")
    self.busy += 1
    try:
      yield
    finally:
      self.busy -= 1

  async def body(self, request: Request) -> dict[str, Any]:
    """The request's JSON object, however long it says that it is."""
    read = bytearray()
    async for chunk in request.stream():
      read += chunk
      self._check_size(str(len(read)))
    try:
      body = json.loads(read)
    except (ValueError, RecursionError):
      raise McjaxError("the request is not JSON") from None
    if not isinstance(body, dict):
      raise McjaxError("the request is not a JSON object")
    return body
