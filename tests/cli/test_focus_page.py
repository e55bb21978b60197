"""The page of a run: what it holds, and that a browser shows it."""

import json
import os
import pathlib
import subprocess
import sys

from browser import needs_browser, opened
import pytest

from mcjax import Config
from mcjax.cli import focus_page
from mcjax.evaluation.systems.models import Models
from mcjax.testing import tiny_base
from mcjax.types import McjaxError

_ROOT = pathlib.Path(__file__).parents[2]
_TEXT = "The harbour master is called <b>Oda</b> Brink. " * 60


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm, tiny_gistnet):
  """A folder with the telemetry of two questions, and the kept texts."""
  folder = tmp_path_factory.mktemp("run")
  config = Config(window=512, policy="similarity", sink_tokens=32,
                  telemetry_path=str(folder / focus_page.TELEMETRY))
  with Models(tiny_lm, tiny_gistnet).create(
      tiny_base.memory_url(), config) as mc:
    mc.ingest(_TEXT)
    for question in ("Who is the harbour master?", "And </script> now?"):
      mc.generate(question, max_new_tokens=40)
    focus_page.keep_texts(folder, mc.text, mc.cursor)
  return folder


def test_records_tile_the_history(run):
  found = focus_page.records(run)
  kinds = [r["kind"] for r in found]
  assert kinds.count("generate") == 2 and kinds.count("refocus") >= 2
  for r in found:
    spans = r["spans"]
    assert spans[0][1] == 0
    assert all(a[2] == b[1] for a, b in zip(spans, spans[1:]))
    if r["kind"] == "refocus":
      assert len(r["scores"]) == len(spans)
      assert all(-1 <= s <= 1 for s in r["scores"])


def test_every_span_has_its_text(run):
  known = focus_page.kept_texts(run)
  for r in focus_page.records(run):
    for level, a, b in r["spans"]:
      assert known[f"{a}-{b}"] or level == 0
  answers = [r for r in focus_page.records(run) if r["kind"] == "generate"]
  whole = known[f"{answers[0]['start']}-{answers[0]['cursor']}"]
  assert "Who is the harbour master?" in whole
  assert "Oda" in known["0-32"] or "Oda" in known["32-64"]


@needs_browser
def test_a_browser_shows_it(run, tmp_path):
  page = focus_page.write(run, focus_page.kept_texts(run))
  document, complaints = opened(page, tmp_path)
  assert not complaints
  assert document.count('class="answer"') == 2
  assert "And &lt;/script&gt; now?" in document
  steps = len(focus_page.records(run))
  assert f"{steps} steps" in document
  assert "http" not in page.read_text().replace("http://www.w3.org", "")


@needs_browser
def test_hovering_shows_the_text_of_a_span(run, tmp_path):
  page = focus_page.write(run, focus_page.kept_texts(run))
  document, complaints = opened(page, tmp_path, """
    const shape = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new MouseEvent("mousemove", {
      clientX: shape.left + LEFT + 2, clientY: shape.top + TOP + 2}));
    document.body.append("shown: " + tip.textContent);""")
  assert not complaints
  told = document.split("shown: ")[-1]
  assert "step 1, L0, tokens 0–32, score" in told and "harbour" in told


@pytest.mark.parametrize("content, says", [
  (None, "No such file"), ("no json\n", "is no telemetry"),
  (json.dumps({"kind": "ingest"}), "tells no focus")])
def test_a_wrong_run_is_told(tmp_path, content, says):
  if content is not None:
    (tmp_path / focus_page.TELEMETRY).write_text(content)
  with pytest.raises(McjaxError, match=says):
    focus_page.records(tmp_path)


def test_the_command_writes_the_page(run):
  def command(*arguments):
    return subprocess.run(
      [sys.executable, str(_ROOT / "tools/view_focus.py"), *arguments],
      capture_output=True, text=True, env={**os.environ, "PYTHONPATH": _ROOT})

  done = command(str(run))
  assert done.returncode == 0, done.stderr
  assert (run / focus_page.PAGE).exists()
  done = command()
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
