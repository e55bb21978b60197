"""Documents name files and settings that are there, and are short."""

import importlib.util
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIGS = _ROOT / "experiments" / "configs"
_RECORD = sorted(_ROOT.glob("docs/trials/*.md"))  # commands of their time
_CURRENT = sorted([*_ROOT.glob("*.md"), *_ROOT.glob("docs/*.md")])
_DOCUMENTS = [*_CURRENT, *_RECORD]
_CARDS = sorted(_ROOT.glob("mcjax/pretrained/*/README.md"))
_LINES = {"README.md": 150, "BUILD_NOTES.md": 400}


def _text(path: pathlib.Path) -> str:
  return path.read_text(encoding="utf-8")


def _anchors(path: pathlib.Path) -> set[str]:
  """What the headings of a page are linked by."""
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
          for heading in re.findall(r"(?m)^#+ (.+)$", _text(path))}


@pytest.mark.parametrize(
  "path", [*_DOCUMENTS, *_CARDS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(path):
  for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", _text(path)):
    target = path.parent / link if link else path
    assert target.exists(), f"{path.name} links to {link}"
    if anchor:
      assert anchor in _anchors(target), f"{path.name}: {link}#{anchor}"


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda p: p.name)
def test_documents_are_short(path):
  lines = _text(path).count("\n")
  assert lines <= _LINES.get(path.name, 250), f"{path.name}: {lines} lines"


@pytest.mark.parametrize("path", _CURRENT, ids=lambda p: p.name)
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


@pytest.mark.parametrize("path", _CURRENT, ids=lambda p: p.name)
def test_named_files_are_there(path):
  for name in re.findall(r"`((?:mcjax|tests|experiments|docs)/[\w./-]+)`",
                         _text(path)):
    assert (_ROOT / name).exists(), f"{path.name}: {name}"
