"""tools/check_tree and tools/inspect_tree, as a user runs them."""

import json
import sys

from absl import flags
import jax
import pytest

import mcjax
from mcjax.cli import check_tree, inspect_tree
from mcjax.testing.tiny_base import gistnet, make_lm, text


@pytest.fixture(scope="module")
def lm():
  return make_lm()


@pytest.fixture
def place(lm, tmp_path):
  config = mcjax.Config(window=256, policy="recency")
  mc = mcjax.MegaContext.create(
    str(tmp_path / "t"), lm, config, gistnet=gistnet(lm))
  mc.ingest(text(600), name="a.md")
  mc.ingest(text(1500, seed=1), name="b.md")
  mc.close()
  return tmp_path / "t"


@pytest.fixture
def run(monkeypatch, capsys, lm):
  """Runs a command: its exit status, what it printed, and its errors."""
  # JAX's flags are defined once a process.
  monkeypatch.setattr(type(jax.config), "config_with_absl", lambda self: None)
  monkeypatch.setattr(mcjax, "load_base_lm", lambda name: lm)
  monkeypatch.setattr(mcjax, "load_gistnet", lambda lm, path: gistnet(lm))

  def run(module, *arguments):
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    flags.FLAGS.unparse_flags()
    for name in ("repair", "compact", "json", "span", "base"):
      flags.FLAGS[name].value = flags.FLAGS[name].default
    with pytest.raises(SystemExit) as ended:
      module.cli()
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err

  yield run
  flags.FLAGS.unparse_flags()
  flags.FLAGS(["tests"])


def test_check_says_clean_and_damaged_and_repairs(place, run, tmp_path):
  status, out, _ = run(check_tree, place)
  assert status == 0 and "clean" in out and len(out.splitlines()) == 1
  (place / "gists/0/L1/c/0/0").write_bytes(b"x")
  report = tmp_path / "report.json"
  status, out, _ = run(check_tree, place, f"--json={report}")
  assert status == 1 and "DAMAGE: gists/0/L1" in out and "damaged" in out
  fields = json.loads(report.read_text())
  assert not fields["clean"] and fields["findings"][0]["mend"] == "derive"
  status, out, _ = run(check_tree, place, "--repair")
  assert status == 0 and "done: gists: " in out
  assert run(check_tree, place)[0] == 0


def test_forgotten_text_is_erased(place, run, lm):
  mc = mcjax.MegaContext.open(str(place), lm, gistnet=gistnet(lm))
  mc.forget("a.md")
  mc.close()
  status, out, _ = run(check_tree, "--compact", place)
  assert status == 0 and "600 forgotten tokens erased" in out
  mc = mcjax.MegaContext.open(str(place), lm, gistnet=gistnet(lm))
  assert [d.name for d in mc.documents()] == ["b.md"]
  assert text(600)[:40] not in mc.text(0, 700)
  assert text(1500, seed=1) in mc.text(0, mc.cursor)
  assert {s.document for s in mc.search(text(1500, seed=1)[:60])} <= {"b.md"}
  mc.close()


def test_mistakes_exit_with_two(place, run):
  for arguments in ((), (place, place), (place / "none",),
                    (place, "--no_such")):
    status, _, err = run(check_tree, *arguments)
    assert status == 2 and err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_inspect(place, run):
  status, out, _ = run(inspect_tree, place)
  assert status == 0 and "a.md" in out and "L1" in out
  status, out, _ = run(inspect_tree, place, "--json")
  facts = json.loads(out)
  assert [d["name"] for d in facts["documents"]] == ["a.md", "b.md"]
  b = facts["documents"][1]
  status, out, _ = run(
    inspect_tree, place, f"--span={b['start']}:{b['start'] + 50}")
  assert status == 0 and out == text(1500, seed=1)[:50] + "\n"
  for span in ("5", "7:5", "0:99999"):
    status, _, err = run(inspect_tree, place, f"--span={span}")
    assert status == 2 and "--span" in err
