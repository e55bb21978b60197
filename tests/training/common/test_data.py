"""Stores, deduplication, and the sampler's order."""

import collections

import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from mcjax.training.common import data, own_text, prepare, sources
from mcjax.types import McjaxError


def test_store_round_trip(tmp_path):
  documents = [("a", np.arange(300)), ("short", np.arange(5)),
               ("b", np.arange(400) + 7)]
  count, tokens = data.write_kind(tmp_path, "train", "code", documents, 1000)
  assert (count, tokens) == (2, 700)
  store = data.open_split(tmp_path, "train")["code"]
  assert [*store.names] == ["a", "b"] and store.tokens.dtype == np.uint16
  assert isinstance(store.tokens, np.memmap)
  np.testing.assert_array_equal(store.document(1), np.arange(400) + 7)


def test_large_vocabulary_needs_wide_tokens(tmp_path):
  data.write_kind(tmp_path, "train", "code",
                  [("a", np.full(300, 200_000))], 262_144)
  assert data.open_split(tmp_path, "train")["code"].document(0)[0] == 200_000


def test_missing_store_says_what_to_run(tmp_path):
  with pytest.raises(McjaxError, match="tools/prepare_data"):
    data.open_split(tmp_path, "train")


def test_windows_never_cross_documents(tmp_path):
  documents = [(str(i), np.full(300 + 50 * i, i)) for i in range(9)]
  data.write_kind(tmp_path, "train", "x", documents, 100)
  sampler = data.WindowSampler(data.open_split(tmp_path, "train"), 64)
  seen = [sampler.sample(i) for i in range(200)]
  assert all(len(set(w)) == 1 for w in seen)
  assert {int(w[0]) for w in seen} == set(range(9))


def test_an_epoch_visits_every_window_once(tmp_path):
  tokens = np.arange(64 * 40)
  data.write_kind(tmp_path, "train", "x", [("a", tokens)], 4000)
  sampler = data.WindowSampler(data.open_split(tmp_path, "train"), 64, seed=4)
  size = sampler._size(0, 0)
  starts = [int(sampler.sample(i)[0]) for i in range(size)]
  assert len(set(starts)) == size and size >= 39
  again = [int(sampler.sample(size + i)[0]) for i in range(size - 1)]
  assert set(again) != set(starts)  # the next epoch cuts elsewhere


def test_mixture_follows_the_weights(tiny_stores):
  marked = {}
  for value, (kind, store) in enumerate(tiny_stores.items()):
    marked[kind] = data.TokenStore(
      np.full_like(store.tokens, value), store.offsets, store.names)
  sampler = data.WindowSampler(marked, 64, {"code": 3.0, "prose": 1.0})
  counts = collections.Counter(
    int(sampler.sample(i)[0]) for i in range(400))
  assert counts[sorted(marked).index("code")] == 300


def test_batches_are_pure(tiny_stores):
  one, two = (data.WindowSampler(tiny_stores, 64, seed=9) for _ in range(2))
  whole = one.batch(12, 8)
  for _ in range(3):
    two.sample(1)
  for place in (7, 0, 3):
    np.testing.assert_array_equal(two.sample(12 * 8 + place), whole[place])


def test_fingerprint_tells_data_and_mixture_apart(tiny_stores):
  own = data.fingerprint(tiny_stores)
  assert own == data.fingerprint(tiny_stores, {"code": 1.0, "prose": 1.0})
  assert own != data.fingerprint(tiny_stores, {"code": 1.0, "prose": 2.0})
  store = tiny_stores["code"]
  changed = data.TokenStore(store.tokens[:-1], store.offsets, store.names)
  other = data.fingerprint({**tiny_stores, "code": changed})
  assert other["kinds"]["prose"] == own["kinds"]["prose"]
  assert other["kinds"]["code"] != own["kinds"]["code"]


def test_sampler_errors(tiny_stores):
  with pytest.raises(McjaxError, match="unknown kinds"):
    data.WindowSampler(tiny_stores, 64, {"poetry": 1.0})
  with pytest.raises(McjaxError, match="no document of kind"):
    data.WindowSampler(tiny_stores, 4096)


def test_deduplication_works_across_documents_and_spacing():
  seen = data.Deduplicator(shortest=20)
  long = "The same long paragraph, told twice."
  assert seen(f"{long}\n\nshort") == f"{long}\n\nshort"
  assert seen("The same  LONG paragraph,\ntold twice.\n\nshort") == "short"
  assert seen.dropped == 1


def test_validation_documents_are_stable_and_few():
  kept = [data.validation_document(f"document {i}") for i in range(2400)]
  assert 150 < sum(kept) < 250


def test_html_keeps_text_and_drops_scripts():
  text = sources.strip_html(
    "<head><title>t</title></head><body><script>x()</script>"
    "<p>One &amp; two.</p><p>Three.</p></body>")
  assert "x()" not in text and "One & two.\n\nThree." in text.strip()


@pytest.mark.parametrize("name, foreign", [
  ("usr/share/doc/handbook/html/de-DE/ch01.html", True),
  ("usr/share/help/de/gnucash-guide/index.html", True),
  ("usr/share/doc/gnucash-docs/gnucash-guide-pt/a.html", True),
  ("usr/share/doc/gnucash-docs/gnucash-guide-en/a.html", False),
  ("usr/share/doc/policy.html/ch-scope.de.html", True),
  ("usr/share/doc/handbook/html/en-US/ch01.html", False),
  ("usr/share/doc/python3.11/html/library/re.html", False)])
def test_only_english_pages(name, foreign):
  assert bool(sources._FOREIGN.search(name)) == foreign


def test_held_out_sources_are_read_first_and_share_no_package(tmp_path):
  every = sources.all_sources(tmp_path, full=True)
  splits = [s.split for s in every]
  assert splits == sorted(splits, key=["heldout", "train"].index)
  held_out = {"python-django-doc", "gnucash-docs"}
  assert not held_out & set(sources.DEBIAN_FULL)
  assert not {"flask", "networkx", "moto"} & set(sources.TRAINING_CODE)


def test_packages_of_another_release_are_left_out(
    tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sources, "run_client", lambda *a: "perl-doc\nzsh-doc\n")
  (tmp_path / "git-doc_2.39_all.deb").touch()
  wanted = ("perl-doc", "git-doc", "linux-doc-6.12")
  assert sources._offered(tmp_path, wanted) == ("perl-doc", "git-doc")
  assert "left out: linux-doc-6.12" in capsys.readouterr().out
  with pytest.raises(McjaxError, match="apt-get update"):
    sources._offered(tmp_path, ("linux-doc-6.12",))


class Lm:
  name, fingerprint = "x", "y"
  config = type("C", (), {"vocab_size": 300})

  class tokenizer:
    @staticmethod
    def encode(text):
      return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def test_prepare_writes_disjoint_splits(tmp_path, monkeypatch):
  paragraph = "word " * 60
  made = [
    sources.Source("heldout", "prose", lambda d: iter(
      [(f"h{i}", f"{paragraph} held {i}") for i in range(3)])),
    sources.Source("train", "prose", lambda d: iter(
      [(f"t{i}", f"{paragraph} train {i}") for i in range(60)]
      + [("copy", f"{paragraph} held 1")]))]
  monkeypatch.setattr(sources, "all_sources", lambda books, full: made)

  (tmp_path / "books").touch()
  records = prepare.prepare(Lm, tmp_path, tmp_path / "books", 1.0)
  splits = {r["split"]: r["documents"] for r in records}
  assert splits["heldout"] == 3
  assert splits["train"] + splits["validation"] == 60  # the copy is dropped
  assert splits["validation"] > 0
  assert set(data.open_split(tmp_path, "train")) == {"prose"}
  with pytest.raises(McjaxError, match="unknown kind"):
    prepare.prepare(Lm, tmp_path, tmp_path / "none", 1.0, kinds=["verse"])
  without = prepare.prepare(Lm, tmp_path, tmp_path / "none", 1.0)
  assert {(r["split"], r["kind"]) for r in without} == {("heldout", "prose")}


def test_a_store_that_is_not_complete_is_refused(tmp_path, monkeypatch):
  """Some of its kinds are there already, others are not."""
  kinds = [sources.Source("train", kind, lambda d: iter(
    (f"{i}", f"{'word ' * 60} {i}") for i in range(60))) for kind in "ab"]
  monkeypatch.setattr(sources, "all_sources", lambda books, full: kinds)
  write = data.write_kind

  def stopped(folder, split, kind, *rest):
    if kind == "b":
      raise KeyboardInterrupt
    return write(folder, split, kind, *rest)

  monkeypatch.setattr(data, "write_kind", stopped)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(Lm, tmp_path, tmp_path / "none", 1.0)
  with pytest.raises(McjaxError, match="not complete"):
    data.open_split(tmp_path, "train")
  monkeypatch.setattr(data, "write_kind", write)
  prepare.prepare(Lm, tmp_path, tmp_path / "none", 1.0)
  assert set(data.open_split(tmp_path, "train")) == {"a", "b"}
  monkeypatch.setattr(data, "write_kind", stopped)
  with pytest.raises(KeyboardInterrupt):  # what was complete stays so
    prepare.prepare(Lm, tmp_path, tmp_path / "none", 1.0)
  assert set(data.open_split(tmp_path, "train")) == {"a", "b"}


def test_kinds_are_weighed_by_mixture_or_by_name(tmp_path, capsys):
  for kind in ("own", "notes"):
    data.write_kind(tmp_path, "train", kind, [("a", np.arange(300))], 512)

  def weights(mixture, kinds=()):
    stores, found = data.open_mixture(tmp_path, mixture, kinds)
    assert set(stores) == set(found)
    return found

  assert weights({"own": 2.0, "chat": 0.0}) == {"own": 2.0}
  assert weights({}) == {"own": 1.0, "notes": 1.0}
  assert weights({"chat": 1.0}, ["notes:3", "own"]) == {
    "notes": 3.0, "own": 1.0}
  assert not capsys.readouterr().err
  assert weights({"chat": 1.0, "prose": 1.0}) == {"own": 1.0, "notes": 1.0}
  assert "notes, own, in equal shares" in capsys.readouterr().err
  with pytest.raises(McjaxError, match="--config.kinds=notes,own"):
    weights({"chat": 1.0, "own": 1.0})
  with pytest.raises(McjaxError, match="weight of own is 'much'"):
    weights({}, ["own:much"])


def test_the_end_of_every_own_text_is_for_validation(tmp_path):
  texts = {"long": "ab " * 4000, "middling": "cd " * 400, "short": "ef"}
  records = prepare.prepare_own(Lm, tmp_path, texts.items())
  assert [r["documents"] for r in records] == [2, 2]  # the short are one
  train, validation = (
    data.open_split(tmp_path, split)["own"] for split in
    ("train", "validation"))
  joined = [texts["long"].strip(), texts["middling"].strip() + "\n\nef"]
  for i, text in enumerate(joined):
    whole = np.concatenate([s.document(i) for s in (train, validation)])
    assert bytes(whole.astype(np.uint8)).decode() == text
  assert len(validation.document(0)) == 1199  # a tenth of the stripped text
  assert len(validation.document(1)) == 512


def test_many_short_texts_make_a_store(tmp_path):
  posts = [(str(i), f"post {i} says " + "ab " * 40) for i in range(120)]
  records = prepare.prepare_own(Lm, tmp_path, posts)
  total = sum(len(text.strip()) + 2 for _, text in posts)
  assert sum(r["tokens"] for r in records) == pytest.approx(total, abs=8)
  train = data.open_split(tmp_path, "train")["own"]
  assert min(len(train.document(i)) for i in range(len(train.names))) > 2000


def test_own_text_that_is_too_short_is_told(tmp_path):
  with pytest.raises(
      McjaxError, match="2 texts hold 273 tokens together, 512 are needed"):
    prepare.prepare_own(Lm, tmp_path, [("a", "ab " * 90), ("b", "ab")])


def test_no_short_text_is_left_out(tmp_path):
  """Neither behind a long one nor alone; what repeats is counted."""
  said = "ab " * 50
  texts = [("long", "cd " * 3000), ("a", said), ("b", said), ("c", "")]
  records = prepare.prepare_own(Lm, tmp_path / "one", texts)
  assert [r["documents"] for r in records] == [1, 1]
  total = 3 * 3000 - 1 + 2 + 3 * 50 - 1
  assert sum(r["tokens"] for r in records) == total
  lines = prepare.told(records).splitlines()
  assert lines[0] == (f"4 texts with {total:,} tokens; short ones are joined: "
                      "1 documents")
  assert lines[1].split() == ["train", "own", "1", "documents",
                              f"{records[0]['tokens']:,}", "tokens"]
  assert lines[-1].startswith("2 of the texts left out")
  notes = [(str(i), f"{i} " * 90) for i in range(4)]
  records = prepare.prepare_own(Lm, tmp_path / "two", notes)
  assert [r["documents"] for r in records] == [1, 1]
  assert "little text: 4,096 tokens are wanted" in prepare.told(records)


def test_the_order_visits_every_place_once():
  for size in (1, 2, 63, 64, 65, 1000):
    places = [data._shuffled_place(i, size, 7) for i in range(size)]
    assert sorted(places) == list(range(size))
  assert places != list(range(size))


def test_a_store_that_fails_half_way_leaves_nothing(tmp_path):
  with pytest.raises(ZeroDivisionError):
    with data.StoreWriter(tmp_path, "train", "x", 100) as writer:
      writer.add("a", np.zeros(300, int))
      1 / 0  # noqa: B018
  assert not list(tmp_path.iterdir())


def test_own_files_of_every_form(tmp_path):
  (tmp_path / "a.md").write_text("one")
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep/b.py").write_text("two")
  (tmp_path / "c.jsonl").write_text('{"body": "three"}\n\n{"body": "four"}\n')
  parquet.write_table(
    pyarrow.table({"body": ["five", "six"]}), tmp_path / "d.parquet")
  found = own_text.read(
    [f"{tmp_path}/**/*.md", f"{tmp_path}/deep", f"{tmp_path}/c.jsonl",
     f"{tmp_path}/*.parquet"], field="body")
  assert [text for _, text in found] == [
    "one", "two", "three", "four", "five", "six"]
  with pytest.raises(McjaxError, match="no text under 'text'"):
    list(own_text.read([f"{tmp_path}/c.jsonl"]))
  with pytest.raises(McjaxError, match="nothing.txt"):
    list(own_text.read([f"{tmp_path}/nothing.txt"]))


def test_own_text_of_two_kinds_in_one_store(tmp_path):
  text = "".join(f"Line {i} says {i * i}.\n" for i in range(900))
  for kind in ("notes", "mail"):
    records = prepare.prepare_own(
      Lm, tmp_path, [("a", text + kind)], kind)
    assert {r["kind"] for r in records} == {kind}
  assert sorted(data.open_split(tmp_path, "train")) == ["mail", "notes"]
  other = type("Other", (Lm,), {"fingerprint": "another"})
  with pytest.raises(McjaxError, match="use another folder"):
    prepare.prepare_own(other, tmp_path, [("a", text)])


def test_a_store_lies_on_this_machine():
  with pytest.raises(McjaxError, match="gs://b/text: give a folder of this"):
    data.open_split("gs://b/text", "train")
