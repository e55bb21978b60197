"""The server through OpenAI's own client, over a socket."""

import dataclasses
import importlib.resources
import threading
import time

from browser import needs_browser, visited
import pytest

from mcjax import Config, Engine
from mcjax.serve.histories import Histories
from mcjax.testing import tiny_base

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

KEY = "secret"
READER = """<script>
// The browser's clock is a virtual one, which stands still while it fetches.
const shown = async (id, text) => {
  while (!$(id).textContent.includes(text)) await fetch("/health");
};
(async () => {
  $("key").value = "secret"; $("name").value = "browser";
  const dropped = new DataTransfer();
  dropped.items.add(new File([TEXT], "pump.md"));
  $("memory").dispatchEvent(new DragEvent("drop", {dataTransfer: dropped}));
  await shown("documents", "pump.md (");
  $("prompt").value = "what is the PUMP CODE?";
  $("ask").requestSubmit();
  await shown("sources", "7314");
})();
</script>"""


@pytest.fixture(scope="module")
def served(tiny_lm, tiny_gistnet, tmp_path_factory):
  from mcjax.serve.app import Server
  from mcjax.serve.guard import Limits
  lm = dataclasses.replace(
    tiny_lm, tokenizer=tiny_base.byte_tokenizer(chat=True))
  config = Config(window=512, recent_tokens=64, gists_per_level=8)
  root = tmp_path_factory.mktemp("histories")
  with Engine(lm, config, slots=2, gistnet=tiny_gistnet) as engine:
    engine.warm_up()  # clients do not wait for compilers
    server = Server(Histories(engine, str(root)), KEY, Limits(1 << 20, 64, 8))
    app = server.app()
    app.add_route("/read", _read_page)
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    while not runner.started:
      time.sleep(0.02)
    port = runner.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    runner.should_exit = True
    thread.join()
    server.close()


async def _read_page(request):
  """The page, and what a reader does on it."""
  from starlette.responses import HTMLResponse
  del request
  page = importlib.resources.files("mcjax.serve") / "page.html"
  text = tiny_base.text(700, 1).replace(".", " ") + ". THE PUMP CODE IS 7314."
  return HTMLResponse(page.read_text("utf-8") + READER.replace(
    "TEXT", repr(text)))


@pytest.fixture(scope="module")
def client(served):
  return openai.OpenAI(base_url=served + "/v1", api_key=KEY, max_retries=0,
                       timeout=300)


@pytest.fixture(scope="module")
def http(served):
  with httpx.Client(base_url=served, timeout=300,
                    headers={"Authorization": f"Bearer {KEY}"}) as http:
    yield http


def ask(client, content, **more):
  return client.chat.completions.create(
    model="tiny", messages=[{"role": "user", "content": content}], **more)


def test_chat_stream_stop_seed_logprobs(client):
  kept = dict(user="a", seed=5, temperature=0.8, max_tokens=24,
              extra_body={"remember": False})
  out = ask(client, "hi", logprobs=True, **kept)
  assert out.choices[0].finish_reason == "length"
  assert out.usage.completion_tokens == 24
  assert len(out.choices[0].logprobs.content) == 24
  assert all(t.logprob <= 0 for t in out.choices[0].logprobs.content)
  text = out.choices[0].message.content
  chunks = list(ask(client, "hi", stream=True, **kept))
  assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
  assert len(chunks) > 2 and chunks[-1].choices[0].finish_reason == "length"
  stopped = ask(client, "hi", stop=[text[5:7]], **kept)
  assert stopped.choices[0].message.content == text[: text.index(text[5:7])]
  assert stopped.choices[0].finish_reason == "stop"
  done = client.completions.create(
    model="tiny", prompt="abc", max_tokens=4, user="a")
  assert done.usage.completion_tokens == 4
  assert client.models.list().data[0].id == "tiny"


def test_the_likeliest_tokens_stand_beside_each(client):
  kept = dict(user="a", max_tokens=6, extra_body={"remember": False},
              logprobs=True, top_logprobs=3)
  told = ask(client, "hi", **kept).choices[0].logprobs.content
  for token in told:  # greedy: the likeliest is the one that was said
    assert token.top_logprobs[0].token == token.token
    assert token.top_logprobs[0].logprob == token.logprob
    values = [t.logprob for t in token.top_logprobs]
    assert len(values) == 3 and values == sorted(values, reverse=True)
  *_, last, counted = ask(client, "hi", stream=True, stream_options={
    "include_usage": True}, **kept)
  assert counted.usage.completion_tokens == 6 and not counted.choices
  streamed = last.choices[0].logprobs.content
  assert [t.logprob for t in streamed] == [t.logprob for t in told]
  done = client.completions.create(
    model="tiny", prompt="abc", max_tokens=4, user="a", logprobs=2)
  assert len(done.choices[0].logprobs.token_logprobs) == 4
  assert all(map(len, done.choices[0].logprobs.top_logprobs))


def test_a_system_prompt_leads_every_turn(client):
  """A client that tells it again and again, and one that tells none."""
  sizes = {}
  for user, told in (("told", [{"role": "system", "content": "BE BRIEF"}]),
                     ("untold", [])):
    talk = [*told, {"role": "user", "content": "one"}]
    client.chat.completions.create(
      model="tiny", messages=talk, user=user, max_tokens=2)
    talk += [{"role": "assistant", "content": "x"},
             {"role": "user", "content": "two"}]
    out = client.chat.completions.create(
      model="tiny", messages=talk, user=user, max_tokens=2)
    sizes[user] = out.usage.prompt_tokens  # one a byte
  assert sizes["told"] >= sizes["untold"] + len("BE BRIEF")


def test_an_answer_cites_the_document(client, http):
  for name, fact in [("pump.md", "THE PUMP CODE IS 7314."),
                     ("gate.md", "THE GATE OPENS AT NINE."),
                     ("pilot.md", "KAI SOLHEIM IS PILOT.")]:
    text = tiny_base.text(700, len(name)).replace(".", " ") + ". " + fact
    made = http.post("/v1/histories/b/documents",
                     json={"name": name, "text": text})
    assert made.json()["document"] == name and not made.json()["skipped"]
  out = ask(client, "what is the PUMP CODE?", user="b", max_tokens=2)
  sources = out.model_extra["mcjax"]["sources"]
  assert sources[0]["document"] == "pump.md"
  found = http.post("/v1/histories/b/search", json={"query": "KAI SOLHEIM"})
  assert found.json()["data"][0]["document"] == "pilot.md"
  assert http.delete("/v1/histories/b/documents/pilot.md").status_code == 200
  names = [d["name"] for d in
           http.get("/v1/histories/b/documents").json()["data"]]
  assert names == ["pump.md", "gate.md"]
  focus = http.get("/v1/histories/b/focus").json()
  assert focus["entries"][-1][2] == focus["cursor"]


def test_more_histories_than_slots_come_and_go(client, http):
  for name in "cdef":
    ask(client, "hello " + name, user=name, max_tokens=3)
  names = {h["id"] for h in http.get("/v1/histories").json()["data"]}
  assert set("cdef") <= names
  assert http.delete("/v1/histories/c").json()["deleted"]
  assert http.get("/v1/histories/c/focus").status_code == 404


def test_what_is_not_to_be_remembered_leaves_no_history(client, http):
  asked = dict(user="nobody", max_tokens=2, extra_body={"remember": False})
  before = http.get("/v1/histories").json()
  out = ask(client, "hello?", **asked)
  assert out.usage.completion_tokens == 2
  assert out.model_extra["mcjax"] == {"answerable": 0.0, "sources": []}
  assert list(ask(client, "hello?", stream=True, **asked))
  assert http.get("/v1/histories").json() == before
  assert http.get("/v1/histories/nobody/focus").status_code == 404


def test_mistakes_are_told(client, http, served):
  with pytest.raises(openai.BadRequestError, match="temperature"):
    ask(client, "hi", temperature=-1, user="a")
  with pytest.raises(openai.BadRequestError, match="name"):
    ask(client, "hi", user="../evil")
  with pytest.raises(openai.AuthenticationError):
    openai.OpenAI(base_url=served + "/v1", api_key="no").models.list()
  assert http.post("/v1/chat/completions", content=b"{").status_code == 400
  big = {"name": "x", "text": "x" * (1 << 20)}
  assert http.post("/v1/histories/a/documents", json=big).status_code == 413
  refused = http.post("/v1/histories/a/search", json={"quer": "x"})
  assert refused.status_code == 400
  assert "query is missing; the body has quer" in refused.text
  chunked = http.post("/v1/histories/a/documents",
                      content=(b" " * (1 << 16) for _ in range(20)))
  assert chunked.status_code == 413  # told no length
  for wrong in (dict(max_tokens="a"), dict(max_tokens=-1), dict(stop=5),
                dict(seed=-4),
                dict(logprobs=True, top_logprobs=99), dict(presence_penalty=1),
                dict(logit_bias={"5": 1}), dict(tools=[{"type": "function"}]),
                dict(response_format={"type": "json_object"})):
    with pytest.raises(openai.BadRequestError, match=next(reversed(wrong))):
      ask(client, "hi", **{"user": "a", "max_tokens": 2} | wrong)
  with pytest.raises(openai.BadRequestError, match="an answer already"):
    client.chat.completions.create(model="tiny", user="a", messages=[
      {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_page_health_and_metrics(http, served):
  assert "<canvas" in httpx.get(served + "/").text
  assert httpx.get(served + "/health").json() == {"status": "ok"}
  assert httpx.get(served + "/metrics").status_code == 401
  told = http.get("/metrics").text
  assert 'route="/v1/chat/completions",status="200"' in told
  assert "mcjax_tokens_decoded_total" in told


@needs_browser
def test_a_browser_drops_a_file_asks_and_sees_the_source(served, tmp_path):
  document, complaints = visited(served + "/read", tmp_path)
  assert "pump.md: read" in document and "pump.md (" in document
  assert '<div class="source"><b>pump.md' in document
  assert "THE PUMP CODE IS 7314" in document.split('id="sources"')[1]
  assert "slots over" in document and "Uncaught" not in complaints


def test_more_clients_than_slots_wait_their_turn(client):
  """Each has a history of its own; nobody starves, nothing is mixed."""
  answers = {}

  def work(i):
    out = ask(client, f"client {i}", user=f"many{i}", max_tokens=2)
    answers[i] = out.model_extra["mcjax"], out.usage.completion_tokens

  threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(answers) == list(range(6))
