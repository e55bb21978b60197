"""Documents name files and settings that are there, and are short."""

import importlib.util
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIGS = _ROOT / "experiments" / "configs"
_DOCUMENTS = sorted([*_ROOT.glob("*.md"), *_ROOT.glob("docs/*.md")])
_RECORD = "trials.md"  # commands of their time
_LINES = {"README.md": 150, "BUILD_NOTES.md": 400, _RECORD: 1500}


def _text(path: pathlib.Path) -> str:
  return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
  for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", _text(path)):
    assert (path.parent / link).exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda p: p.name)
def test_documents_are_short(path):
  lines = _text(path).count("\n")
  assert lines <= _LINES.get(path.name, 250), f"{path.name}: {lines} lines"


@pytest.mark.parametrize(
  "path", [p for p in _DOCUMENTS if p.name != _RECORD], ids=lambda p: p.name)
def test_commands_are_there(path):
  text = _text(path)
  for module in re.findall(r"python -m (experiments\.\w+)", text):
    assert importlib.util.find_spec(module), f"{path.name}: {module}"
  for tool in re.findall(r"\btools/(\w+(?:\.py)?)", text):
    assert (_ROOT / "tools" / tool).exists(), f"{path.name}: tools/{tool}"
  for name in re.findall(r"--config=([\w/]+)(?:\.py)?", text):
    name = name.removeprefix("experiments/configs/")
    if name in ("evaluate/NAME", "evaluate/X"):
      continue
    assert (_CONFIGS / f"{name}.py").exists(), f"{path.name}: {name}"


@pytest.mark.parametrize(
  "path", [p for p in _DOCUMENTS if p.name != _RECORD], ids=lambda p: p.name)
def test_named_files_are_there(path):
  for name in re.findall(r"`((?:mcjax|tests|experiments|docs)/[\w./-]+)`",
                         _text(path)):
    assert (_ROOT / name).exists(), f"{path.name}: {name}"
