"""Asking and chatting on the command line."""

import io
import pathlib

import pytest

from mcjax.cli import configs, session
from mcjax.cli.chat import Chat
from mcjax.testing import tiny_base
from mcjax.types import McjaxError

_FOLDER = pathlib.Path(configs.__file__).parents[2] / "experiments" / "configs"


def _run(tree, ingest=(), prompt="", **asked):
  config = configs.load(configs.find("run", _FOLDER))
  config.base = "/nowhere"  # what is refused is refused before it is loaded
  session.run(config, tree=str(tree), ingest=ingest, suffixes=[],
              prompt=prompt, show_focus=False, workdir="", **asked)


@pytest.mark.parametrize("asked", [
  {"prompt": "who?"}, {"search": "who"}, {"documents": True},
  {"forget": ["a"]}])
def test_a_misspelt_tree_is_refused_and_not_made(make, tmp_path, asked):
  make(str(tmp_path / "own"))
  (tmp_path / "onwer").mkdir()  # alike in name, and no history
  with pytest.raises(McjaxError, match=r"no history at .*did you mean .*/own"):
    _run(tmp_path / "onw", **asked)
  with pytest.raises(McjaxError, match="no history at .*--ingest=FILE begins"):
    _run(tmp_path / "xyz" / "q", **asked)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["onwer", "own"]


@pytest.mark.parametrize("asked", [{}, {"ingest": [__file__], "prompt": "a"}])
def test_a_chat_and_an_ingest_begin_a_history(make, tmp_path, asked, capsys):
  make(str(tmp_path / "own"))
  with pytest.raises(McjaxError, match="/nowhere"):  # went on to the base
    _run(tmp_path / "onw", **asked)
  told = capsys.readouterr().err
  assert f"begins at {tmp_path}/onw; did you mean {tmp_path}/own?" in told


@pytest.fixture
def mc(make):
  mc = make(window=256)
  text = tiny_base.text(700, 1).replace(".", " ")
  mc.ingest(text + ". THE PUMP CODE IS 7314. " + text, name="pump.md")
  return mc


def _said(capsys):
  out, err = capsys.readouterr()
  return out.splitlines(), err.splitlines()


def test_an_answer_tells_what_it_was_read_from(mc, make, capsys):
  Chat(mc, 2).answer("what is the PUMP CODE?")
  read = _said(capsys)[1]
  assert read[0] == "Read from:" and read[1].split()[0] == "pump.md"
  assert "PUMP CODE IS 7314" in read[1]
  Chat(mc, 2).answer("zzqq?")
  (line,) = _said(capsys)[1]
  assert line.startswith("Read from: no passage")
  Chat(mc, 2, sources=False).answer("what is the PUMP CODE?")
  assert not _said(capsys)[1]
  Chat(make(), 2).answer("what is the PUMP CODE?")
  assert _said(capsys)[1] == ["Read from: nothing; the history was empty."]


def test_a_piped_chat_shows_its_questions_and_knows_commands(
    mc, monkeypatch, capsys):
  lines = ["one", "/help", "", "/documents", "/focus", "/nothing", "/quit",
           "unasked"]
  monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
  Chat(mc, 1, sources=False).run()
  out, _ = _said(capsys)
  shown = [line for line in out if line.startswith("> ")]
  assert shown == ["> one", "> /help", "> /documents", "> /focus",
                   "> /nothing", "> /quit"]
  text = "\n".join(out)
  assert "/quit      end the chat" in text and "tokens  pump.md" in text
  assert "/nothing is no command" in text and "L0:" in text
  said = mc.text(0, mc.cursor)
  assert "one" in said and "/help" not in said and "unasked" not in said
