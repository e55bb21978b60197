"""A disk that is full or out of reach, at every write of a call."""

import contextlib

from kernel_faults import file_limit, no_permission
import numpy as np
import pytest
from runtime_cases import SMALL, settled_logits, state_of

from mcjax import Config, McjaxError, MegaContext
from mcjax.testing import tiny_base
from mcjax.testing.tree_reference import FailingWrites

_MANY = 1 << 30


@pytest.fixture
def opened(tiny_lm, tiny_gistnet, tmp_path):
  """(a history that was used and opened again, how to open it once more)."""
  url = str(tmp_path / "t")
  config = Config(**SMALL, policy="similarity")
  mc = MegaContext.create(url, tiny_lm, config, gistnet=tiny_gistnet)
  mc.ingest(tiny_base.text(1500), name="first")
  mc.generate("warm", 4)
  mc.close()

  def again():
    return MegaContext.open(url, tiny_lm, gistnet=tiny_gistnet)

  return again


def calls(mc):
  """What writes: name and call, with what it must have done in the end."""
  text = tiny_base.text(3000, 7)
  return {
    "ingest": lambda: mc.ingest(text, name="second"),
    "generate": lambda: mc.generate("and then?", 8),
    "stream": lambda: list(mc.stream("and then?", 8)),
    "forget": lambda: mc.forget("first"),
  }


@pytest.mark.parametrize("name", ["ingest", "generate", "stream", "forget"])
def test_a_write_that_fails_changes_nothing_and_can_be_tried_again(
  opened, monkeypatch, name
):
  writes = FailingWrites(monkeypatch, _MANY)
  mc = opened()
  call, failures, before = calls(mc)[name], 0, state_of(mc)
  logits = settled_logits(mc)
  for allowed in range(40):
    writes.left = allowed
    try:
      call()
      break
    except McjaxError as error:
      assert "No space left" in str(error) and "\n" not in str(error)
    writes.left, failures = _MANY, failures + 1
    assert state_of(mc) == before
    np.testing.assert_array_equal(settled_logits(mc), logits)
  assert failures >= 2  # rows and the record, at least
  writes.left = _MANY
  held = mc.text(0, mc.cursor)
  assert held.count(tiny_base.text(3000, 7)) == (name == "ingest")
  assert held.count("and then?") == (name in ("generate", "stream"))
  assert len(mc.documents()) == {"ingest": 2, "forget": 0}.get(name, 1)
  mc.close()
  mc = opened()
  assert mc.text(0, mc.cursor) == held
  mc.close()


def test_the_kernel_refuses_writes(opened, tmp_path):
  """Real errors of the file system, where they come from."""
  mc = opened()
  before, text, failures = state_of(mc), tiny_base.text(3000, 7), 0
  faults = [lambda size=size: file_limit(size) for size in
            (0, 100, 400, 1000, 2000, 4000)]
  for fault in [*faults, lambda: no_permission(tmp_path / "t")]:
    with fault(), contextlib.suppress(McjaxError):
      mc.ingest(text, name="second")
    if mc.documents()[-1].name == "second":
      break
    failures += 1
    assert state_of(mc) == before
  with no_permission(tmp_path / "t"), pytest.raises(McjaxError):
    mc.generate("and then?", 4)
  mc.ingest(text, name="second")
  assert failures >= 3 and mc.text(0, mc.cursor).count(text) == 1
  mc.close()
  mc = opened()
  assert mc.text(0, mc.cursor).count(text) == 1
  mc.close()


def test_what_is_not_remembered_needs_no_room(opened, monkeypatch):
  writes = FailingWrites(monkeypatch, _MANY)
  mc = opened()
  before, text = state_of(mc), tiny_base.text(100, 9)

  def use():
    out = mc.generate("and?", 4, remember=False, temperature=0.0)
    return mc.score(text), out.text

  (nll, said), writes.left = use(), 0
  again = use()
  np.testing.assert_array_equal(again[0], nll)
  assert again[1] == said and state_of(mc) == before
  mc.search("and?")
  writes.left = _MANY
  mc.close()


def test_a_close_that_fails_gives_the_tree_back(opened, monkeypatch):
  writes = FailingWrites(monkeypatch, _MANY)
  mc = opened()
  writes.left = 0
  with pytest.raises(McjaxError, match="No space left"):
    mc.close()
  writes.left = _MANY
  opened().close()


def test_statistics_that_are_damaged_fail_no_call(opened, tmp_path):
  mc = opened()
  mc.tree.record_access(np.array([1, 2]), np.array([0, 0]))
  mc.close()
  counts = [p for p in (tmp_path / "t/access").rglob("*") if p.is_file()]
  assert len(counts) >= 4  # metadata and rows
  for path in counts:
    path.write_bytes(b"damaged")
  mc = opened()
  mc.tree.record_access(np.array([1, 2]), np.array([0, 0]))
  mc.ingest(tiny_base.text(1500, 5), name="second")
  mc.generate("again", 8)
  mc.close()
  mc = opened()
  assert [d.name for d in mc.documents()] == ["first", "second"]
  mc.close()
