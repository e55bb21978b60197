"""What makes the kernel refuse writes."""

import contextlib
import os
import resource


@contextlib.contextmanager
def file_limit(size):
  """No file may grow beyond so many bytes, as if the disk were full there."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_permission(folder):
  """Nothing can be written into a folder any more."""
  if os.geteuid():
    places = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for place in places:
      place.chmod(0o500)
    try:
      yield
    finally:
      for place in places:
        place.chmod(0o700)
  else:  # root may do all, until it is somebody else
    os.seteuid(65_534)
    try:
      yield
    finally:
      os.seteuid(0)
