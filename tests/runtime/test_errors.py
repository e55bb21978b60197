"""Bad input to a MegaContext: one clear line, and nothing changed."""


import numpy as np
import pytest
from runtime_cases import settled_logits, state_of

from mcjax import McjaxError, MegaContext
from mcjax.testing import tiny_base
from mcjax.testing.tree_reference import FailingWrites


@pytest.fixture
def used(make):
  mc = make(policy="similarity", gist_attention="visible")
  mc.ingest(tiny_base.text(1500))
  mc.generate("first", max_new_tokens=20)
  return mc


@pytest.mark.parametrize("call, message", [
  (lambda mc: mc.ingest(""), "text is empty"),
  (lambda mc: mc.ingest(b"bytes"), "text must be a string, got bytes"),
  (lambda mc: mc.ingest(None), "text must be a string, got NoneType"),
  (lambda mc: mc.ingest("\ud800"), "not valid Unicode"),
  (lambda mc: mc.score(""), "text is empty"),
  (lambda mc: mc.score(["a"]), "text must be a string, got list"),
  (lambda mc: mc.score("\ud800"), "not valid Unicode"),
  (lambda mc: mc.generate(""), "prompt is empty"),
  (lambda mc: mc.generate(7), "prompt must be a string or messages, got int"),
  (lambda mc: mc.generate("\ud800"), "not valid Unicode"),
  (lambda mc: mc.generate("a", top_p=1.5), "top_p must be in .* got 1.5"),
  (lambda mc: mc.generate("a", seed=-1), "seed must be"),
  (lambda mc: mc.generate("a", stop=[""]), "stop must be"),
  (lambda mc: mc.generate([{"role": "user"}]), "role and a content"),
  (lambda mc: mc.generate("a", -3), "max_new_tokens .* got -3"),
  (lambda mc: mc.generate("a", 2.5), "max_new_tokens .* got 2.5"),
  (lambda mc: mc.generate("a", "5"), "max_new_tokens .* got 5"),
  (lambda mc: mc.ingest_tokens(np.zeros(0, np.int32)), "no tokens"),
  (lambda mc: mc.ingest_tokens(np.array([5, 300])), "vocabulary of 300"),
  (lambda mc: mc.ingest_tokens(np.array([-1])), "vocabulary of 300"),
])
def test_bad_input_is_one_line_and_changes_nothing(used, call, message):
  logits, before = settled_logits(used), state_of(used)
  with pytest.raises(McjaxError, match=message) as caught:
    call(used)
  assert "\n" not in str(caught.value)
  assert state_of(used) == before
  np.testing.assert_array_equal(used.next_logits(), logits)
  assert len(used.generate("still there?", max_new_tokens=40).token_ids) == 40


def test_a_failing_gistnet_leaves_everything_usable(used, monkeypatch):
  before = state_of(used)
  with monkeypatch.context() as patch:
    patch.setattr(
      used.tree._encoder, "encode_tokens",
      lambda ids: np.full((len(ids), 32), np.nan, np.float32),
    )
    for call in (used.ingest, used.score):
      with pytest.raises(McjaxError, match="not finite"):
        call(tiny_base.text(100, 6))
      assert state_of(used) == before
  used.ingest(tiny_base.text(100, 6))
  assert used.cursor == before["cursor"] + 100
  assert len(used.generate("so?", max_new_tokens=40).token_ids) == 40


def test_the_oracle_does_not_generate(make):
  mc = make(policy="oracle")
  mc.ingest(tiny_base.text(1500))
  before = state_of(mc)
  with pytest.raises(McjaxError, match="oracle .* in score only"):
    mc.generate("hello")
  assert state_of(mc) == before
  assert np.isfinite(mc.score(tiny_base.text(80, 2))).all()


def test_an_empty_history_predicts_nothing(make):
  mc = make()
  with pytest.raises(McjaxError, match="history is empty"):
    mc.next_logits()


def test_a_closed_context_says_so(make):
  mc = make()
  mc.ingest(tiny_base.text(300))
  mc.next_logits()
  mc.close()
  mc.close()
  for call in (
    lambda: mc.ingest("a"), lambda: mc.generate("a"), lambda: mc.score("a"),
    mc.next_logits,
  ):
    with pytest.raises(McjaxError, match="closed"):
      call()


def test_the_wrong_base_or_gistnet_is_refused(make, tmp_path, tiny_lm):
  url = str(tmp_path / "t")
  mc = make(url)
  mc.ingest(tiny_base.text(100))
  mc.close()
  other = tiny_base.make_lm(seed=1, name="other")
  with pytest.raises(McjaxError, match="tiny .*other "):
    MegaContext.open(url, other, gistnet=tiny_base.gistnet(other))
  with pytest.raises(McjaxError, match="GistNet"):
    MegaContext.open(url, tiny_lm, gistnet=tiny_base.gistnet(tiny_lm))
  again = MegaContext.open(url, tiny_lm, gistnet=mc._loop._encoder)
  assert again.cursor == 101
  again.close()


def test_places_that_cannot_be_used(make, tmp_path, tiny_lm, tiny_gistnet):
  (tmp_path / "file").write_text("x")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "letter").write_text("dear")
  for place in (tmp_path / "file" / "t", tmp_path / "full", "ftp://a/b",
                "/proc/mcjax/t"):
    with pytest.raises(McjaxError) as caught:
      make(str(place))
    assert "\n" not in str(caught.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
  assert [p.name for p in (tmp_path / "full").iterdir()] == ["letter"]
  with pytest.raises(McjaxError, match="no tree"):
    MegaContext.open(str(tmp_path / "none"), tiny_lm, gistnet=tiny_gistnet)
  assert not (tmp_path / "none").exists()


def test_a_second_create_leaves_the_first_alone(make, tmp_path):
  mc = make(str(tmp_path / "t"))
  mc.ingest(tiny_base.text(100))
  with pytest.raises(McjaxError, match="already holds a tree"):
    make(str(tmp_path / "t"))
  mc.ingest(tiny_base.text(100, 1))
  assert mc.cursor == 201


def test_a_window_beyond_the_base_is_refused_before_anything_is_made(
  make, tmp_path
):
  with pytest.raises(McjaxError, match=r"config\.window 2048 .*2048 positions"):
    make(str(tmp_path / "t"), window=2048)
  assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_create_on_a_full_disk_leaves_nothing(
  make, tmp_path, monkeypatch, allowed
):
  """Whichever write of the record fails; creating again then works."""
  with monkeypatch.context() as patch:
    writes = FailingWrites(patch, allowed)
    try:
      make(str(tmp_path / "t"))
      assert writes.left >= 0, "a failed write was passed over"
    except McjaxError as error:
      assert "No space left" in str(error)
      assert list(tmp_path.iterdir()) == []
      patch.undo()
      make(str(tmp_path / "t")).ingest("works now")


def test_a_telemetry_file_that_cannot_be_written(make, tmp_path):
  with pytest.raises(McjaxError, match=r"config\.telemetry_path"):
    make(str(tmp_path / "t"), telemetry_path=str(tmp_path / "no" / "t.jsonl"))
  assert not (tmp_path / "t").exists()


def test_a_with_block_closes(make):
  with make() as mc:
    mc.ingest("abc")
  with pytest.raises(McjaxError, match="closed"):
    mc.ingest("abc")
