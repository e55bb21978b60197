"""The needle suite, end to end on a tiny base."""

import numpy as np
import pytest
from untimed import untimed

from mcjax.evaluation.data import hidden_facts, ruler
from mcjax.evaluation.data.ruler import Sample
from mcjax.evaluation.report.writer import Report
from mcjax.evaluation.suites import needle, needle_depths
from mcjax.evaluation.suites.needle_depths import Hit
from mcjax.evaluation.systems.models import Models
from mcjax.gist.encoder import load_gistnet
from mcjax.testing import tiny_base
from mcjax.types import McjaxError

SETTINGS = needle.Settings(
  tasks=("niah_multikey_3", "fwe", "qa2", "passkey"), lengths=(2400,),
  samples=1,
  systems=("megacontext/similarity", "bm25", "full", "evidence"),
  reference="megacontext/similarity", window=512, depths=(0.0, 1.0),
  answer_tokens=4)


@pytest.fixture
def models(monkeypatch):
  monkeypatch.setattr(hidden_facts, "read_babi", lambda path: (
    {"task": "qa2", "facts": ["Mary got the milk.", "Mary went to the hall."],
     "question": "Where is the milk?", "answer": "hall", "support": [0, 1]},
  ) * 3)
  monkeypatch.setattr(hidden_facts, "read_books",
                      lambda path: ("It was dark. Nobody slept. " * 400,))
  lm = tiny_base.make_lm(chat=True)
  return Models(lm, load_gistnet(lm))


def values(report):
  return {k: v.value for k, v in report.figures.items()}


def test_every_task_is_scored_and_its_evidence_found(models, tmp_path):
  report = needle.measure(models, SETTINGS, tmp_path)
  report.write(tmp_path)
  figures = values(report)
  count = 3 + 2  # of the pass key one at each depth
  assert figures["2400/all/evidence/score/n"] == count
  assert figures["2400/all/evidence/view_recall"] == 1
  assert figures["2400/all/bm25/view_recall"] > 0.3
  assert "2400/all/full/score" not in figures, "the base has 2,048 positions"
  for task in SETTINGS.tasks:
    assert f"2400/{task}/bm25/score" in figures
  assert figures["2400/passkey/bm25/depth 1.0/score/n"] == 1
  for kind in ("needles", "facts in books"):
    counts = [figures.get(f"2400/{kind}/bm25/depth {d}/score/n", 0)
              for d in needle_depths.QUARTERS]
    assert sum(counts) == 1, "a needle lies in one quarter"
  assert [m.title for m in report.heat_maps if "bm25" in m.title] == [
    "Pass key, bm25: score", "Needles, bm25: score",
    "Facts in books, bm25: score"]
  assert not (tmp_path / "trees").exists()
  text = (tmp_path / "results.md").read_text()
  assert "Pass key by depth" in text and "facts in books" in text
  again = values(needle.measure(models, SETTINGS, tmp_path))
  assert again == figures


def test_where_the_evidence_is_needs_no_answers(models, tmp_path, monkeypatch):
  few = needle.dataclasses.replace(
    SETTINGS, evidence_only=True, tasks=("passkey",),
    systems=("megacontext/similarity", "evidence"))
  figures = values(needle.measure(models, few, tmp_path))
  assert figures["2400/passkey/evidence/depth 0.0/view_recall"] == 1
  assert not any("score" in name for name in figures)


def test_the_same_seed_gives_the_same_figures(models, tmp_path):
  few = needle.dataclasses.replace(
    SETTINGS, tasks=("qa2", "passkey"), depths=(0.5,),
    systems=("megacontext/similarity", "bm25", "evidence"))
  once, again = (untimed(needle.measure(models, few, tmp_path / name))
                 for name in "ab")
  assert once == again and "2400/passkey/bm25/score" in once


def test_evidence_spans_of_tokens_are_exact(models):
  sample = Sample("Aé b. FACT one. c FACT two. d", "?", ("x",),
                  ((6, 15), (18, 27)))
  ids, spans = needle.encode(models.lm, sample)
  text = [models.lm.tokenizer.decode(ids[a:b].tolist()) for a, b in spans]
  assert text == sample.told() == ["FACT one.", "FACT two."]
  assert models.lm.tokenizer.decode(ids.tolist()) == sample.context


def test_every_needle_has_its_own_place_and_answer(models):
  sample = ruler.needles(
    ruler.Draws(), 50, "repeat", "uuids", "numbers", 1, 1, 4)
  ids, spans = needle.encode(models.lm, sample)
  found = needle.parts("niah_multiquery", sample, spans)
  assert len(found) == 4
  for (answer,), ((start, stop),) in found:
    assert answer in models.lm.tokenizer.decode(ids[start:stop].tolist())
  assert needle.parts("qa2", sample, spans) == [(sample.answers, spans)]
  assert not needle.parts("vt", sample, spans)
  assert [needle_depths.quarter(d) for d in (0, 0.24, 0.25, 0.99, 1)] == [
    0, 0, 1, 3, 3]


def test_a_map_tells_what_was_found_where():
  out = Report("needle", {})
  hits = {4096: {"a": [Hit(0, 1.0, 0), Hit(0, 0.0, 0), Hit(3, 1.0, 1)],
                 "b": []},
          8192: {"a": [Hit(1, 0.0, 0)]}}
  needle_depths.add(
    out, "Needles", "needles", needle_depths.QUARTERS, hits, "score",
    "score")
  (shown,) = out.heat_maps
  assert shown.rows == ["4,096", "8,192"]
  assert shown.values == [[0.5, None, None, 1.0], [None, 0.0, None, None]]
  assert out.figures["4096/needles/a/depth 0-0.25/score/n"].value == 2
  assert out.tables[0].rows[1] == ["4,096", "b", None, None, None, None]


def test_the_same_seed_gives_the_same_samples(models):
  for task in SETTINGS.tasks:
    a = list(needle.make_samples(models.lm, SETTINGS, task, 2400))
    assert a == list(needle.make_samples(models.lm, SETTINGS, task, 2400))
    ids, spans = needle.encode(models.lm, a[0][1])
    assert 1200 < len(ids) <= 2500 and bool(spans) == (task != "fwe")
    assert np.all(np.diff(np.array(spans).ravel()) >= 0)


def test_unknown_tasks_are_named():
  with pytest.raises(McjaxError, match="no task 'niah'"):
    needle.Settings(tasks=("niah",))
  assert len(ruler.TASKS) == 13
