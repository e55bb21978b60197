"""Checking, repairing and inspecting stored trees."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from mcjax.testing import corruption
from mcjax.testing.tiny_base import memory_url
from mcjax.testing.tree_reference import (
  TinyEncoder,
  TinyKeyer,
  create,
  peek,
  random_ids,
  reopen,
)
from mcjax.testing.tree_reference import (
  check as check_content,
)
from mcjax.tree import columns, inspection
from mcjax.tree.check import check
from mcjax.tree.columns import Column
from mcjax.tree.compaction import compact
from mcjax.tree.repair import repair
from mcjax.tree.store import (
  COPY_KEY,
  RECORD_KEY,
  Store,
  decode_record,
  encode_record,
)
from mcjax.types import McjaxError

ARTEFACTS = pathlib.Path(__file__).parent / "artefacts"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  return corruption.make_case(tmp_path_factory.mktemp("case"))


@pytest.fixture
def place(case, tmp_path):
  """A copy of the case's tree, to be damaged."""
  shutil.copytree(case.folder, tmp_path / "t")
  return tmp_path / "t"


def models():
  return TinyEncoder(), TinyKeyer()


def flip(path, at=-20):
  raw = bytearray(path.read_bytes())
  raw[at] ^= 255
  path.write_bytes(raw)


def content(place):
  return corruption.contents(peek(place, keyer=TinyKeyer()))


def assert_same(found, expected, but=()):
  for key in expected:
    if key not in but:
      np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


@pytest.mark.parametrize("count", [
  60, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_corruption_is_silent(case, count):
  assert not check(case.folder).findings
  outcomes = list(corruption.corruptions(case, count, count))
  print(corruption.table(outcomes))
  bad = [o for o in outcomes if not o[2].startswith(("told", "harmless"))]
  assert not bad
  assert sum(o[2] != "harmless" for o in outcomes) > count // 2
  assert not check(case.folder).findings


def test_a_whole_tree_is_clean(place, case):
  report = check(place)
  assert not report.findings and not report.damage
  fields = json.loads(json.dumps(report.as_json()))
  assert fields["clean"] and fields["tokens"] == 110_000
  assert fields["rows"]["tokens"] == 110_000
  assert fields["rows"]["gists/0/L1"] == 110_000 // 32
  reopen(place).close()  # beside a writer, too
  url = memory_url()
  create(url).close()
  assert not check(url).findings
  with pytest.raises(McjaxError, match="no tree"):
    check(place / "elsewhere")


@pytest.mark.parametrize("version", ["tree_v1", "tree_v2"])
def test_old_trees_are_clean(tmp_path, version):
  shutil.copytree(ARTEFACTS / version, tmp_path / "t")
  assert not check(tmp_path / "t").findings


@pytest.mark.parametrize("files, where, mend", [
  (["keys/L2/c/0/0"], "keys/L2", "derive"),
  (["gists/0/L1/c/13/0"], "gists/0/L1", "derive"),
  (["gists/0/L1/packed/c/0/0", "gists/0/L2/c/0/0"], "gists/0/L2", "derive"),
  (["lens/0/L1/c/3/0", "lens/0/L2/c/0/0"], "lens/0/L1", "derive"),
  (["frequency/c/0/0", "frequency/c/1/0"], "frequency", "recount"),
  (["gists/0/L1/sums/c/0"], "gists/0/L1/sums", "sums"),
  (["access/L1/c/0"], "access/L1", "drop"),
  (["gists/0/L1/zarr.json"], "gists/0/L1", "metadata"),
  (["tokens/zarr.json", "tokens/sums/zarr.json"], "tokens", "metadata"),
  (["gists/0/L1/packed/zarr.json"], "gists/0/L1/packed", "metadata"),
  ([RECORD_KEY], RECORD_KEY, "record"),
  ([COPY_KEY], COPY_KEY, "record"),
])
def test_what_follows_from_something_is_made_anew(
  case, place, files, where, mend
):
  for name in files:
    path = place / name
    if mend in ("metadata", "sums"):
      path.unlink()
    elif path.exists():  # one slot of the frequencies may not be
      flip(path, 5)
  found = {(f.where, f.mend) for f in check(place).findings}
  assert (where, mend) in found
  assert check(place).damage or where in (COPY_KEY, "access/L1")
  report, done = repair(place, models)
  assert done and not report.findings
  assert_same(content(place), case.content)
  assert not repair(place, models)[1]


def test_lost_tokens_are_told_and_never_guessed(case, place):
  flip(place / "tokens/c/0", 2000)
  report, done = repair(place, models)
  (finding,) = report.damage
  assert (finding.where, finding.mend, done) == ("tokens", "", [])
  (rows,) = finding.rows
  assert rows[1] - rows[0] == 1024 and "tokens [" in str(finding)
  tree = peek(place, keyer=TinyKeyer())
  tree.gists(1, 0, 3000)
  with pytest.raises(McjaxError, match="damaged|could not read"):
    tree.tokens(*rows)
  assert_same({"tokens": tree.tokens(rows[1], 110_000)},
              {"tokens": case.content["tokens"][rows[1]:]})
  # Gists of lost tokens stay lost; the others come back.
  (place / "gists/0/L1/packed/c/0/0").unlink()
  report, done = repair(place, models)
  assert "stay lost" in done[0] and len(report.damage) == 2


def test_nothing_is_made_anew_by_other_models(place):
  (place / "gists/0/L1/c/13/0").unlink()
  for others in (None, lambda: (TinyEncoder(seed=3), None)):
    report, done = repair(place, others)
    assert report.damage and "stay lost" in done[0]
  (place / "lens/0/L1/c/3/0").unlink()
  report, done = repair(place, lambda: (TinyEncoder(), TinyKeyer(seed=3)))
  assert [f.where for f in report.damage] == ["lens/0/L1"]
  assert "tools/rekey" in done[1]


def test_an_older_record_gives_way_to_its_copy(case, place):
  shutil.copy(case.older[0] / RECORD_KEY, place)
  with pytest.raises(McjaxError, match="put back"):
    peek(place)
  report, done = repair(place)
  assert not report.findings and done == [
    f"the commit record is that of commit {report.record['commit']}"]
  assert_same(content(place), case.content)


def test_a_record_that_nothing_replaces(place):
  for key in (RECORD_KEY, COPY_KEY):
    flip(place / key, 30)
  report, done = repair(place, models)
  assert len(report.damage) == 1 and not done
  assert report.as_json()["tokens"] is None


def test_content_that_is_wrong_though_its_checksums_are_right(tmp_path):
  """What only a writer in error could store."""
  encoder, tree = TinyEncoder(), create(tmp_path / "t", keyer=TinyKeyer())
  ids = random_ids(40_000)
  tree.append(ids)
  for kind, level in (("keys", 2), ("lens", 2)):
    column = tree._levels.column(kind, level)
    rows = column.read(0, column.length)
    rows[3] ^= 1
    column._tail = [rows]
  tree._frequency.counts[7] += 1
  tree._frequency._saved = -10**6
  tree.commit()
  tree.close()
  report = check(tmp_path / "t")
  found = {f.where: f for f in report.damage}
  assert {"keys/L2", "lens/0/L2", "frequency"} <= found.keys()
  assert found["keys/L2"].rows == ((3, 4),)
  report, _ = repair(tmp_path / "t", models)
  assert not report.findings
  check_content(peek(tmp_path / "t", encoder), ids, keyer=TinyKeyer())


def test_checksums_of_checksums(tmp_path, monkeypatch):
  """Pages of lost checksums come back where a checksum vouches for them."""
  monkeypatch.setattr(columns, "SUMS", columns.SUMS._replace(chunk=4, shard=8))
  ids, tree = random_ids(40_000), create(tmp_path / "t")
  tree.append(ids)
  tree.commit()
  tree.close()
  assert (tmp_path / "t/gists/0/L1/sums/sums/sums").exists()
  for name in ("sums/c/1", "sums/c/2", "sums/sums/c/0"):
    (tmp_path / "t/gists/0/L1" / name).unlink()
  assert len(check(tmp_path / "t").damage) >= 3
  report, _ = repair(tmp_path / "t")
  assert not report.findings
  check_content(peek(tmp_path / "t"), ids)


def test_strange_files_and_left_epochs_are_notes(place):
  (place / "letter.txt").write_text("dear")
  tree = reopen(place, keyer=TinyKeyer())
  tree.rebuild_gists(TinyEncoder(seed=1))
  tree.close()
  (place / "gists/0").mkdir()
  (place / "gists/0/left").write_text("x")
  report = check(place)
  assert not report.damage and len(report.findings) == 2
  compact(place)
  assert [f.where for f in check(place).findings] == ["letter.txt"]


def test_a_newer_format_is_no_damage(place):
  record = decode_record((place / RECORD_KEY).read_bytes(), "t")
  (place / RECORD_KEY).write_bytes(encode_record(record | {"version": 99}))
  with pytest.raises(McjaxError, match="newer"):
    check(place)


def test_damage_is_found_by_chunks():
  store = Store(memory_url())
  spec = columns.SUMS._replace(chunk=2, shard=4)
  column = Column(store, "x", spec, 0, {})
  column.append(np.arange(11))
  columns.flush_columns([column], "u", everything=True)
  assert list(column.damage()) == []
  store.array("x", spec, create=False)[5].write(99).result()
  store.array("x", spec, create=False)[10].write(99).result()
  again = Column(store, "x", spec, 11, column.record_sums())
  assert list(again.damage()) == [(4, 6), (10, 11)]
  sums, known = again.stored_sums()
  assert known.all() and len(sums) == 5


def test_inspection(place):
  tree = reopen(place, keyer=TinyKeyer())
  for name, start in (("a.md", 5), ("b.md", 500)):
    tree.journal.add("document", name=name, start=start, stop=start + 400,
                     digest="", metadata={}, time=1.0)
  tree.journal.add("forgotten", start=5, stop=405, time=2.0)
  tree.record_access(np.array(2), np.array([7, 7, 8]))
  tree.commit()
  with inspection.open_any(place) as reader:
    facts = json.loads(json.dumps(inspection.inspect(reader)))
  tree.close()
  assert facts["tokens"] == 110_000 and facts["base"]["name"] == "tiny"
  assert [d["name"] for d in facts["documents"]] == ["b.md"]
  assert facts["forgotten_tokens"] == 400
  level = facts["levels"][2]
  assert (level["nodes"], level["accesses"]) == (110_000 // 1024, 3)
  assert (level["nodes_used"], level["most_used"]) == (2, 7)
  sizes = [p.stat().st_size for p in place.rglob("*") if p.is_file()]
  assert abs(facts["parts"]["all"]["bytes"] - sum(sizes)) < 500  # the lock's
  assert facts["parts"]["gists"]["files"] > 3
