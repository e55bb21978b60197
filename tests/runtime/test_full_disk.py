"""A disk that is full, at every write of a call."""

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
    "forget": lambda: mc.forget("first"),
  }


@pytest.mark.parametrize("name", ["ingest"])
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
  assert held.count("and then?") == (name == "generate")
  assert len(mc.documents()) == {"ingest": 2, "generate": 1, "forget": 0}[name]
  mc.close()
  mc = opened()
  assert mc.text(0, mc.cursor) == held
  mc.close()
