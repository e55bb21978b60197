"""Documents: files, folders, standard input, and bytes that are no text."""

import io
import types

import pytest

from mcjax.runtime.text_files import TextFile, decode, read_documents
from mcjax.types import McjaxError


def read(*paths, suffixes=()):
  return list(read_documents([str(p) for p in paths], suffixes))


def test_a_file(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("häuser\r\nund 中文\n", encoding="utf-8", newline="")
  assert read(path) == [TextFile(str(path), "häuser\r\nund 中文\n", 0)]


@pytest.mark.parametrize("raw, text, replaced", [
  (b"caf\xe9 au lait", "caf\ufffd au lait", 1),
  (b"\xff\xfeA", "\ufffd\ufffdA", 2),
  (b"ok \xe4\xbd", "ok \ufffd", 1),  # cut inside a character
  ("\ufffd itself".encode(), "\ufffd itself", 0),  # a genuine one
  ("\ufffd and ".encode() + b"\x80", "\ufffd and \ufffd", 1),
  (b"", "", 0),
])
def test_bytes_that_are_no_utf8_are_replaced_and_counted(raw, text, replaced):
  assert decode("x", raw) == TextFile("x", text, replaced)


def test_a_folder_is_read_sorted_without_hidden_and_binary_files(tmp_path):
  for name, raw in {
    "b.py": b"b", "a.txt": b"a", "sub/c.py": b"c", "sub/d.md": b"\xe9",
    ".hidden": b"no", ".git/x.py": b"no", "__pycache__/y.py": b"no",
    "empty.py": b"", "picture.png": b"\x89PNG\0\0",
  }.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(raw)

  def names(**kwargs):
    return [d.name[len(str(tmp_path)) + 1 :] for d in read(tmp_path, **kwargs)]

  assert names() == ["a.txt", "b.py", "sub/c.py", "sub/d.md"]
  assert names(suffixes=[".py"]) == ["b.py", "sub/c.py"]
  assert names(suffixes=[".md", ".txt"]) == ["a.txt", "sub/d.md"]
  assert [d.replaced for d in read(tmp_path, suffixes=[".md"])] == [1]


def test_what_is_named_is_read_whatever_it_is(tmp_path):
  path = tmp_path / ".secret.bin"
  path.write_bytes(b"\0\x80")
  assert read(path, suffixes=[".py"]) == [TextFile(str(path), "\0\ufffd", 1)]
  assert [d.name for d in read(path, path)] == [str(path)] * 2


def test_standard_input(monkeypatch):
  stdin = types.SimpleNamespace(buffer=io.BytesIO(b"piped \xff"))
  monkeypatch.setattr("sys.stdin", stdin)
  assert read("-") == [TextFile("-", "piped \ufffd", 1)]


def test_a_missing_file_is_one_line(tmp_path):
  with pytest.raises(McjaxError, match="none.txt: No such file") as caught:
    read(tmp_path / "none.txt")
  assert "\n" not in str(caught.value)
