"""The session suite: the right places, and a tiny session held."""

import numpy as np
import pytest

from mcjax.evaluation.data import sessions
from mcjax.evaluation.suites import session
from mcjax.evaluation.systems.models import Models
from mcjax.gist.encoder import load_gistnet
from mcjax.testing import tiny_base
from mcjax.types import McjaxError


@pytest.fixture(scope="module")
def lm():
  return tiny_base.make_lm(chat=True)


@pytest.mark.parametrize("name", sessions.NAMES)
def test_evidence_and_files_are_where_the_session_says(name, lm):
  found = sessions.make(name, lm.tokenizer)
  assert len(found.turns) == 12
  for turn, evidence, files in zip(found.turns, found.evidence, found.files,
                                   strict=True):
    ((start, stop),) = evidence
    text = lm.tokenizer.decode(found.ids[start:stop].tolist())
    if name == "chat":
      assert text == turn.part
    else:
      assert text.split("(")[0].split(":")[0].split()[-1] == (
        turn.part.rpartition(".")[2])
      assert any(a.lower() in text.lower() for a in turn.answers)
    assert any(a <= start and stop <= b for a, b in files)
  kinds = {turn.kind for turn in found.turns}
  assert kinds == {"ask", "follow up", "shift", "return"}


def test_definitions_are_whole():
  text = "x = 1\nclass A:\n  def f(self):\n    return 1\n\n  z = 2\n"
  a, b = sessions.definition(text, "A.f")
  assert text[a:b] == "  def f(self):\n    return 1\n"
  with pytest.raises(McjaxError, match="defines no A.h"):
    sessions.definition(text, "A.h")


def test_a_session_is_held_and_reported(lm, tmp_path):
  chat = sessions.make("chat", lm.tokenizer)
  short = chat._replace(ids=chat.ids[:6000])
  settings = session.Settings(
    sessions=("chat",), systems=("megacontext/oracle", "sink", "evidence"),
    reference="sink", window=512, answer_tokens=4, turns=2)
  models = Models(lm, load_gistnet(lm))
  report = session.measure(models, [short], settings, tmp_path)
  report.write(tmp_path)
  figures = {k: v.value for k, v in report.figures.items()}
  assert figures["chat/evidence/recall"] == 1
  assert figures["chat/evidence/found/n"] == 2
  assert figures["chat/megacontext/oracle/edits"] > 0
  assert figures["chat/sink/file"] < 0.2
  evidence, file = report.charts
  assert evidence.series["evidence"] == ([1, 2], [1.0, 1.0])
  assert np.mean(file.series["sink"][1]) == pytest.approx(
    figures["chat/sink/file"])
  text = (tmp_path / "results.md").read_text()
  assert "On which day do we sail" in text
  again = session.measure(models, [short], settings, tmp_path)
  assert {k: v.value for k, v in again.figures.items()} == figures


def test_mistakes_are_told():
  with pytest.raises(McjaxError, match="no session 'talk'"):
    session.Settings(sessions=("talk",))
  with pytest.raises(McjaxError, match="no session 'talk'"):
    sessions.make("talk", None)
