"""Rooms import downwards only, and no module imports in a circle."""

import ast
import pathlib
import subprocess
import sys

import pytest

import mcjax

_ROOT = pathlib.Path(mcjax.__file__).parent

# From bottom to top: a room may import from itself and from rooms before it.
ROOMS = (
  "types", "settings", "config", "parallel", "pretrained", "base", "tree",
  "gist", "window", "answer", "focus", "lens", "runtime", "testing",
  "training.common", "training.gist", "training.lens", "training.alternating",
  "training.plan",
  "evaluation.report", "evaluation.data", "evaluation.systems",
  "evaluation.suites", "evaluation.runner",
  "evaluation.together", "serve", "cli", "sweep",
)
_HEAVY = ("jax", "flax", "tensorstore", "transformers", "orbax", "tokenizers")


def _modules() -> dict[str, pathlib.Path]:
  found = {}
  for path in _ROOT.rglob("*.py"):
    parts = path.relative_to(_ROOT).with_suffix("").parts
    found[".".join(p for p in parts if p != "__init__")] = path
  return found


MODULES = _modules()


def _imports(path: pathlib.Path) -> set[str]:
  """Modules of mcjax that a file imports anywhere, without the "mcjax."."""
  out = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} imports relatively"
      names = [f"{node.module}.{a.name}" for a in node.names]
    else:
      continue
    for name in names:
      head, _, rest = name.partition(".")
      while head == "mcjax" and rest:
        if rest in MODULES:
          out.add(rest)
          break
        rest = rest.rpartition(".")[0]
  return out


IMPORTS = {name: _imports(path) for name, path in MODULES.items() if name}


def _room(module: str) -> str:
  for room in ROOMS:
    if module == room or module.startswith(room + "."):
      return room
  return ""


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_a_module_imports_from_rooms_below(module):
  room = _room(module)
  if not room:  # a package that only holds rooms
    assert not IMPORTS[module], f"mcjax.{module} belongs to no room"
    return
  above = [other for other in IMPORTS[module] if _room(other)
           and ROOMS.index(_room(other)) > ROOMS.index(room)]
  assert not above, f"mcjax.{module} imports {above} from rooms above {room}"


def test_no_module_imports_in_a_circle():
  done, path = set(), []

  def visit(module):
    if module in path:
      circle = [*path[path.index(module) :], module]
      pytest.fail("circle: " + " -> ".join(circle))
    if module in done:
      return
    path.append(module)
    for other in sorted(IMPORTS.get(module, ())):
      visit(other)
    path.pop()
    done.add(module)

  for module in sorted(IMPORTS):
    visit(module)


def test_import_mcjax_is_light():
  """The libraries load with what uses them, not with the name."""
  code = (
    "import sys, mcjax; dir(mcjax); "
    f"print([m for m in {_HEAVY!r} if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True,
    cwd=_ROOT.parent)
  assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
  assert len(mcjax.__all__) <= 15
  for name in mcjax.__all__:
    assert getattr(mcjax, name).__name__ == name
  with pytest.raises(AttributeError, match="no_such_name"):
    mcjax.no_such_name  # noqa: B018
