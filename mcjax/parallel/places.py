"""Folders of runs: on this machine, or in Google Cloud Storage.

`etils.epath` reads and writes both; Orbax keeps checkpoints in no others.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pathlib

from etils import epath
import numpy as np

from mcjax.types import McjaxError


def place(where) -> epath.Path:
  """A file or folder, a local one by its full path.

  Args:
    where: a path, "file://…" or "gs://…".

  Raises:
    McjaxError: another kind of place, or what it needs is not installed.
  """
  text = os.fspath(where)
  scheme, found, rest = text.partition("://")
  if not found:
    return epath.Path(os.path.abspath(os.path.expanduser(text)))
  if scheme == "file":
    return epath.Path(os.path.abspath(rest))
  if scheme != "gs":
    raise McjaxError(f"{text}: runs are kept under a path or gs://, not in "
                     f"{scheme}://")
  if importlib.util.find_spec("gcsfs") is None:
    raise McjaxError(f"{text} needs gcsfs: pip install 'mcjax[gcs]'")
  return epath.Path(text)


def local(where) -> pathlib.Path:
  """A local file or folder, where nothing else will do.

  Raises:
    McjaxError: it is not on this machine.
  """
  found = place(where)
  if is_remote(found):
    raise McjaxError(f"{found}: give a folder of this machine")
  return pathlib.Path(found)


def is_remote(path: epath.Path) -> bool:
  """Whether it lies in an object store, where a file is written at once."""
  return "://" in os.fspath(path)


def write(path: epath.Path, content: bytes) -> None:
  """Writes a file, whole or not at all; its folder is made."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    path.write_bytes(content)
    return
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(content)
  partial.replace(path)


def save_array(path: epath.Path, array: np.ndarray) -> None:
  """Writes a .npy file, whole or not at all."""
  content = io.BytesIO()
  np.save(content, array)
  write(path, content.getvalue())


def load_array(path: epath.Path) -> np.ndarray:
  """The array of a .npy file."""
  return np.load(io.BytesIO(path.read_bytes()))


def save_arrays(path: epath.Path, **arrays: np.ndarray) -> None:
  """Writes an .npz file, whole or not at all."""
  content = io.BytesIO()
  np.savez(content, **arrays)  # type: ignore[arg-type]
  write(path, content.getvalue())


def load_arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """The arrays of an .npz file, read whole."""
  return dict(np.load(io.BytesIO(path.read_bytes())))
