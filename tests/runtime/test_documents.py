"""Documents of a history: named, searched, forgotten, and kept on disk."""

import dataclasses

import numpy as np
import pytest
from runtime_cases import QUESTION, spans

from mcjax import McjaxError, MegaContext
from mcjax.testing import tiny_base

FACTS = {
  "pump.md": "THE PUMP CODE IS 7314.", "pilot.md": "KAI SOLHEIM IS PILOT.",
  "gate.md": "THE GATE OPENS AT NINE.",
}


def filled(mc, tokens=1500):
  """Ingests one document a fact, the fact in the middle of lower case."""
  for i, (name, fact) in enumerate(FACTS.items()):
    text = tiny_base.text(tokens, i).replace(".", " ")
    text = f"{text[:700]}. {fact} {text[700:]}"
    mc.ingest(text, name=name, metadata={"n": i})
  return mc


def test_documents_are_named_and_stay_so(make, url, tiny_lm, tiny_gistnet):
  mc = filled(make(url))
  documents = mc.documents()
  assert [d.name for d in documents] == list(FACTS)
  assert [d.metadata for d in documents] == [{"n": 0}, {"n": 1}, {"n": 2}]
  for d, fact in zip(documents, FACTS.values()):
    assert fact in mc.text(d.start, d.stop)
    assert len(d.digest) == 64 and d.time > 1e9
  assert documents[-1].stop == mc.cursor
  out = mc.generate(QUESTION, max_new_tokens=2)
  assert out.sources[0].document == "pump.md"
  mc.close()
  with MegaContext.open(url, tiny_lm, gistnet=tiny_gistnet) as mc:
    assert mc.documents() == documents
    out = mc.generate("when does the GATE OPENS?", max_new_tokens=2)
    assert out.sources[0].document == "gate.md"
    assert FACTS["gate.md"] in out.sources[0].text
    assert 0.3 < out.sources[0].score <= 1 and 0.3 < out.answerable <= 1


def test_the_same_content_is_skipped_and_said(make):
  mc = filled(make())
  cursor = mc.cursor
  text = mc.text(mc.documents()[0].start, mc.documents()[0].stop)
  stats = mc.ingest(text, name="copy.md")
  assert stats.skipped and stats.tokens == 0 and stats.document == "pump.md"
  assert stats.cursor == mc.cursor == cursor
  stats = mc.ingest(text + "!", name="pump.md")  # another version
  assert not stats.skipped and len(mc.documents()) == 4


def test_the_same_folder_twice_changes_nothing(make, tmp_path):
  for name, fact in FACTS.items():
    (tmp_path / name).write_text(fact)
  (tmp_path / "empty.md").write_text("")
  mc = make()
  first = mc.ingest_files([str(tmp_path)])
  cursor = mc.cursor
  again = mc.ingest_files([str(tmp_path)], suffixes=[".md"])
  assert mc.cursor == cursor and len(mc.documents()) == 3
  assert [s.skipped for s in first + again] == [False] * 3 + [True] * 3
  assert mc.documents()[0].name == str(tmp_path / "gate.md")


def test_documents_without_a_name_are_numbered_and_join_on(make):
  mc = make()
  mc.ingest("abc")
  mc.ingest("def", name="x")
  mc.ingest("ghi")
  assert [d.name for d in mc.documents()] == ["text 1", "x", "text 3"]
  assert mc.text(0, mc.cursor) == "abc\ndefghi"  # a name begins a line


def test_search_finds_passages_without_generating(make):
  mc = filled(make())
  mc.ingest("A LAST WORD ON OTTERS", name="tail.md")
  before = mc.cursor, mc.focus(), mc.telemetry.counters["lm_tokens"]
  for query, name in [("PUMP CODE", "pump.md"), ("KAI SOLHEIM", "pilot.md"),
                      ("OTTERS", "tail.md")]:
    found = mc.search(query, k=3)
    assert found[0].document == name
    assert query.split()[0] in found[0].text
    assert [s.score for s in found] == sorted(
      (s.score for s in found), reverse=True)
    assert len(found) <= 3
  assert before == (mc.cursor, mc.focus(), mc.telemetry.counters["lm_tokens"])
  assert mc.search("PUMP", k=1)[0].start > 0


def test_a_short_history_is_searched_too(make):
  mc = make()
  assert mc.search("anything") == []
  mc.ingest("the key is 7.", name="a")
  assert mc.search("key")[0].text == "the key is 7."


def test_what_is_forgotten_is_gone_at_once(make, url, tiny_lm, tiny_gistnet):
  mc = filled(make(url, check_invariants=True))
  assert mc.generate(QUESTION, max_new_tokens=2, remember=False).sources
  gone = mc.forget("pump.md")
  assert [d.name for d in gone] == ["pump.md"]

  def check(mc):
    (start, stop), = [(d.start, d.stop) for d in gone]
    assert [d.name for d in mc.documents()] == ["pilot.md", "gate.md"]
    assert not any(s.document == "pump.md" or "PUMP" in s.text
                   for s in mc.search("PUMP CODE", k=20))
    out = mc.generate(QUESTION, max_new_tokens=40, remember=False)
    assert all(b <= start or a >= stop for a, b in spans(out))
    assert not any("PUMP CODE IS" in s.text for s in out.sources)
    context = mc._loop.context
    e = context.window.entries
    hidden = context.window.hidden()
    inside = (e.start() < stop) & (e.start() + e.width() > start)
    assert hidden[inside].all()
    _, visible = context.slot_arrays()
    assert not visible[e.slot[inside]].any()

  check(mc)
  mc.close()
  with MegaContext.open(url, tiny_lm, gistnet=tiny_gistnet) as mc:
    check(mc)
    with pytest.raises(McjaxError, match="pump.md"):
      mc.forget("pump.md")
    mc.ingest(FACTS["pump.md"], name="pump.md")  # told again
    assert mc.search("PUMP CODE", k=1)[0].document == "pump.md"


def test_the_lm_sees_what_it_would_without_the_forgotten_text(
    make, tiny_lm):
  """Logits behind a forgotten text equal those of a history without it."""
  texts = [tiny_base.text(90, 1), tiny_base.text(70, 2), tiny_base.text(50, 3)]
  mc = make(chat="plain")
  for i, text in enumerate(texts):
    mc.ingest(text, name=str(i))
  mc.next_logits()
  mc.forget("1")
  kept = [d for d in mc.documents()]
  ids = [mc.tree.tokens(d.start, d.stop) for d in kept]
  line = tiny_lm.tokenizer.encode("\n")
  ids = np.concatenate([[tiny_base.BOS], ids[0], line, line, ids[1]])
  table = np.asarray(tiny_lm.params["embed"])
  expected = tiny_base.plain_logits(tiny_lm, table[ids], np.arange(len(ids)))
  np.testing.assert_allclose(mc.next_logits(), expected[-1], atol=1e-4)


def test_mistakes_are_told_and_change_nothing(make):
  mc = filled(make())
  cursor, events = mc.cursor, len(mc.tree.journal.events)
  for call, word in [
    (lambda: mc.forget("nowhere.md"), "nowhere.md"),
    (lambda: mc.search(""), "query"), (lambda: mc.search("a", k=0), "k must"),
    (lambda: mc.ingest("new", metadata={"a": object()}), "JSON"),
    (lambda: mc.ingest_files(["/no/such/file"]), "No such file"),
  ]:
    with pytest.raises(McjaxError, match=word):
      call()
  assert (mc.cursor, len(mc.tree.journal.events)) == (cursor, events)


def test_a_transient_document_is_not_there_afterwards(make):
  mc = filled(make())
  with mc._loop.undone():
    mc._documents.add("y", 1, 2, "0" * 64, {})
    assert len(mc.documents()) == 4
  assert len(mc.documents()) == 3
  assert dataclasses.asdict(mc.documents()[0])["name"] == "pump.md"
