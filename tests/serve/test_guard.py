"""What is let in."""

import pytest

from mcjax import McjaxError
from mcjax.serve import openai

pytest.importorskip("starlette")

from starlette.requests import Request  # noqa: E402

from mcjax.serve.guard import Guard, Limits, Refused  # noqa: E402


def request(key="", length="0", host="1.2.3.4"):
  headers = [(b"authorization", f"Bearer {key}".encode()),
             (b"content-length", length.encode())]
  return Request({"type": "http", "method": "POST", "path": "/x",
                  "headers": headers, "client": (host, 1)})


def refused(guard, *args, **what):
  with pytest.raises(Refused) as told:
    guard.check(request(*args, **what), "/x")
  return told.value.response


def test_a_key_is_asked_for_but_by_open_pages():
  guard = Guard("secret", Limits())
  assert refused(guard).status_code == 401
  assert refused(guard, "wröng").status_code == 401
  guard.check(request("secret"), "/x")
  guard.check(request(), "/health")


def test_rates_are_kept_by_client_and_refill(monkeypatch):
  now = 0.0
  monkeypatch.setattr("mcjax.serve.guard.time.monotonic", lambda: now)
  guard = Guard("", Limits(requests_per_minute=2))
  for _ in range(2):
    guard.check(request(), "/x")
  told = refused(guard)
  assert told.status_code == 429 and told.headers["retry-after"] == "31"
  guard.check(request(host="5.6.7.8"), "/x")
  now = 31.0
  guard.check(request(), "/x")
  assert refused(guard).status_code == 429


def test_sizes_and_places_are_bounded():
  guard = Guard("", Limits(body_bytes=10, at_once=1))
  assert refused(guard, length="11").status_code == 413
  assert refused(guard, length="-1").status_code == 400
  with guard.place(), pytest.raises(Refused, match="at once"):
    with guard.place():
      pass
  with guard.place():
    assert guard.busy == 1
  guard.stopping = True
  assert refused(guard).status_code == 503
  with pytest.raises(McjaxError, match="at_once"):
    Limits(at_once=0)


def test_what_a_conversation_says_anew():
  def say(*roles):
    return [{"role": r, "content": f"{r} {n}"} for n, r in enumerate(roles)]

  told, system = openai.conversation(
    say("developer", "user", "assistant", "user"))
  assert system == "developer 0"
  assert [m["content"] for m in openai.unheard(told)] == ["user 3"]
  for wrong in (say("tool"), [3], [], say("user", "assistant"),
                [{"role": "user", "content": [{"type": "image_url"}]}]):
    with pytest.raises(McjaxError):
      openai.conversation(wrong)
