"""Many clients at once against a running server, each asking for its own fact.

  python -m experiments.serve --config=serve --config.slots=16 &
  python tools/load_test.py --clients=64 --seconds=300

Every client has a history of its own with one planted fact, asks for it again
and again, and looks whether the source that is cited holds its own fact and
nobody else's. Prints a line of JSON: requests, errors, mixed histories, and
p50 / p99 of the seconds to the first token and of a token after it.
"""

import argparse
import json
import os
import random
import threading
import time

import httpx
import numpy as np

_FILLER = ("The weather was fair and the tide was low that day. "
           "Boats left early and came back late. ")


class _Client:
  """One client: what it planted, and what it has seen."""

  def __init__(self, number: int, args):
    self.name, self.args = f"load-{os.getpid()}-{number}", args
    self.code = str(10_000 + number * 7)
    self.first: list[float] = []
    self.each: list[float] = []
    self.errors: list[str] = []
    self.mixed = self.missed = self.asked = 0
    self.http = httpx.Client(
      base_url=args.url, timeout=args.timeout,
      headers={"Authorization": "Bearer " + os.environ.get(
        "MCJAX_API_KEY", "none")})

  def plant(self) -> None:
    """Ingests a document that holds the fact, between other text."""
    fact = f"The access code of gate {self.name} is {self.code}. "
    told = self.http.post(
      f"/v1/histories/{self.name}/documents",
      json={"name": f"{self.name}.md",
            "text": _FILLER * 4 + fact + _FILLER * 4})
    if told.status_code != 200:
      self.errors.append(f"ingest {told.status_code}: {told.text[:200]}")

  def ask(self) -> None:
    """Asks for the fact, streamed, and checks what is cited."""
    body = {"user": self.name, "stream": True, "max_tokens": self.args.tokens,
            "remember": False, "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content":
                          f"What is the access code of gate {self.name}?"}]}
    begin, first, sources, count = time.perf_counter(), None, None, 0
    with self.http.stream("POST", "/v1/chat/completions", json=body) as told:
      if told.status_code != 200:
        told.read()
        self.errors.append(f"{told.status_code}: {told.text[:200]}")
        return
      for line in told.iter_lines():
        if not line.startswith("data: {"):
          continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
          self.errors.append(event["error"]["message"])
          return
        if event.get("usage"):
          count = event["usage"]["completion_tokens"]
        sources = event.get("mcjax", sources)
        content = event["choices"] and event["choices"][0]["delta"].get(
          "content")
        if first is None and content:
          first = time.perf_counter() - begin
    self._judge(begin, first, sources, count)

  def _judge(self, begin, first, sources, count) -> None:
    self.asked += 1
    if first is not None:
      self.first.append(first)
      if count > 1:
        self.each.append(
          (time.perf_counter() - begin - first) / (count - 1))
    texts = " ".join(s["text"] for s in (sources or {}).get("sources", []))
    self.missed += self.code not in texts
    self.mixed += any(str(10_000 + n * 7) in texts
                      for n in range(self.args.clients)
                      if str(10_000 + n * 7) != self.code)

  def run(self, end: float) -> None:
    time.sleep(random.Random(self.name).uniform(0, 1))
    try:
      self.plant()
      while time.monotonic() < end:
        self.ask()
    except httpx.HTTPError as error:
      self.errors.append(repr(error))


def _quantiles(values: list[float]) -> dict[str, float]:
  if not values:
    return {}
  p50, p99 = np.quantile(values, [0.5, 0.99]).round(3).tolist()
  return {"p50": p50, "p99": p99, "n": len(values)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--url", default="http://127.0.0.1:8080")
  parser.add_argument("--clients", type=int, default=64)
  parser.add_argument("--seconds", type=float, default=300)
  parser.add_argument("--tokens", type=int, default=16)
  parser.add_argument("--timeout", type=float, default=900)
  args = parser.parse_args()
  clients = [_Client(n, args) for n in range(args.clients)]
  begin = time.monotonic()
  threads = [threading.Thread(target=c.run, args=(begin + args.seconds,))
             for c in clients]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  errors = [e for c in clients for e in c.errors]
  print(json.dumps({
    "clients": args.clients, "seconds": round(time.monotonic() - begin, 1),
    "answers": sum(c.asked for c in clients),
    "fewest_answers_of_a_client": min(c.asked for c in clients),
    "errors": len(errors), "first_errors": errors[:3],
    "mixed_histories": sum(c.mixed for c in clients),
    "own_fact_not_cited": sum(c.missed for c in clients),
    "first_token_s": _quantiles([s for c in clients for s in c.first]),
    "token_s": _quantiles([s for c in clients for s in c.each]),
  }))
  raise SystemExit(bool(errors) or any(c.mixed for c in clients))


if __name__ == "__main__":
  main()
