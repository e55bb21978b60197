"""The suites about cost, end to end on a tiny base."""

import json

import pytest

from mcjax.evaluation.data import texts
from mcjax.evaluation.suites import drift, ingest, overhead, ttft
from mcjax.evaluation.systems import baselines, loop_arm, models, rag

_TEXT = ("The pump house opens at seven. A ferry leaves berth nine.\n" * 40)


@pytest.fixture
def text(tmp_path):
  path = tmp_path / "text.txt"
  path.write_text(_TEXT)
  return (str(path),)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tiny_lm):
  monkeypatch.setattr(models, "load_base_lm", lambda *_, **__: tiny_lm)


class _Embedder:
  """Stands in for the embedding model: letter counts."""

  def __init__(self, batch=1):
    self.batch = batch
    self.config = rag.BertConfig(1, 1, 1e-12)
    import jax.numpy as jnp
    self.params = {"layers": {"q": (jnp.ones((1, 4, 4)), None)},
                   "words": jnp.ones((8, 4))}

  def pieces(self, text):
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]

  def encode(self, texts):
    return self.encode_pieces([[ord(c) for c in t] for t in texts])

  def encode_pieces(self, pieces):
    import numpy as np
    out = np.zeros((len(pieces), 256))
    for row, piece in zip(out, pieces):
      np.add.at(row, np.array(piece) % 256, 1.0)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def _figures(folder):
  return json.loads((folder / "results.json").read_text())["figures"]


def _roofline(figures):
  return {k: v for k, v in figures.items() if k.startswith("device:")}


@pytest.mark.slow
def test_overhead(tmp_path, text, monkeypatch):
  settings = overhead.Settings.quick(
    window=512, histories=(1024, 2048), moving_history=2048,
    exact_history=1024, text=text,
  )
  overhead.run(settings, tmp_path)
  found = _figures(tmp_path)
  for arm in ("splice 1024", "splice 2048", "moving", "exact"):
    assert found[f"{arm}: rate relative to plain"]["value"] > 0
    assert found[f"{arm}: edits per refocus"]["value"] > 0
  assert found["longest history relative to shortest"]["value"] > 0
  assert (tmp_path / "results.md").read_text().startswith("# overhead")
  monkeypatch.setattr(overhead, "_make_arms", None)
  overhead.run(settings, tmp_path)  # what is known is not measured again
  assert _figures(tmp_path) | _roofline(found) == found


@pytest.mark.slow
def test_an_answer_never_ends_in_a_measurement(tmp_path, tiny_lm, text):
  given = models.ModelSettings().load()
  tree = loop_arm.make_tree(given, tmp_path, 1024, text)
  arm = loop_arm.LoopArm(given, tree, loop_arm.Config(window=512))
  arm.decode(3)
  assert arm.loop.telemetry.counters["decoded_tokens"] >= 3 * 32 - 31
  assert arm.loop.context.window.free < 3 * 32
  arm.close()
  again = loop_arm.make_tree(given, tmp_path, 1024, text)
  assert again.cursor == 1024  # what was generated is not kept
  again.close()


@pytest.mark.slow
def test_drift(tmp_path, text):
  settings = drift.Settings.quick(
    history=1024, steps=(2, 4), probes=1, refresh=(0, 2), text=text,
    gist_attention="visible",
  )
  drift.run(settings, tmp_path)
  found = _figures(tmp_path)
  assert abs(found["refresh never: drift after 4 steps"]["value"]) < 1.0
  # A rebuild has just taken place: nothing is left but rounding.
  fresh = found["refresh every 2 steps: drift after 4 steps"]["value"]
  assert abs(fresh) < 1e-4
  assert "refresh never: drift of tokens 0-1/low" in found
  assert found["refresh never: tokens forwarded"]["value"] > 4 * 32
  before = (tmp_path / "refresh-0.json").stat().st_mtime_ns
  drift.run(settings, tmp_path)  # what is known is not measured again
  assert (tmp_path / "refresh-0.json").stat().st_mtime_ns == before


def test_ingest(tmp_path, text, monkeypatch):
  monkeypatch.setattr(rag, "Embedder", _Embedder)
  settings = ingest.Settings.quick(tokens=1024, rag_tokens=512, text=text)
  ingest.run(settings, tmp_path)
  found = _figures(tmp_path)
  assert found["ingest relative to RAG index"]["value"] > 0
  assert found["tree: tokens forwarded"]["value"] == 0
  assert not (tmp_path / "tree").exists()


@pytest.mark.slow
def test_ttft(tmp_path, text, monkeypatch):
  monkeypatch.setattr(rag, "Embedder", _Embedder)
  monkeypatch.setattr(baselines, "CHUNK", 64)
  settings = ttft.Settings.quick(
    window=512, lengths=(300, 700), repeats=1, full_limit=300, rag_limit=300,
    text=text,
  )
  ttft.run(settings, tmp_path)
  found = _figures(tmp_path)
  for name in ("MegaContext, from text", "MegaContext, from its tree"):
    assert found[f"{name}: TTFT at 700"]["value"] > 0
  assert "full attention: TTFT at 700" not in found
  assert found["full attention: tokens forwarded at 300"]["value"] == 300
  loop = [found[f"MegaContext, from its tree: tokens forwarded at {n}"]["value"]
          for n in (300, 700)]
  assert 0 < loop[0] <= 300 + 64 and 0 < loop[1] <= 512 + 64, "and a prompt"
  assert found["RAG, from text: TTFT at 300"]["value"] > 0
  monkeypatch.setattr(ttft, "_measure", pytest.fail)
  ttft.run(settings, tmp_path)  # what is known is not measured again
  assert _figures(tmp_path) == found


def test_text_repeats_where_it_is_short(tiny_lm, text):
  ids = texts.tokens(tiny_lm.tokenizer, 5000, text)
  assert len(ids) == 5000
  again = texts.tokens(tiny_lm.tokenizer, 4990, text, skip=10)
  assert (again == ids[10:]).all()
  assert len(texts.text(tiny_lm.tokenizer, 64)) > 32
