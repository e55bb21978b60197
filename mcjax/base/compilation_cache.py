"""XLA programs kept on disk, so that the next start compiles nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import sys

import filelock
import jax

from mcjax.base import hub

_MOST = 1 << 31  # bytes; what was used longest ago makes room
_PATIENCE = 10.0  # seconds that another process may hold the cache's lock
_LONG = 1.0  # seconds for a program, from which the user is told
_COMPILED = "/jax/core/compile/backend_compile_duration"
_MISSED = "/jax/compilation_cache/cache_misses"
_told = _missed = False


def keep_programs() -> None:
  """Keeps compiled programs in the user cache, unless told otherwise.

  Whoever has set JAX's own `jax_compilation_cache_dir` keeps that, and
  MCJAX_CACHE=off keeps none. A cache that cannot be written is left alone.
  """
  known = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
  if known is not None or os.environ.get("MCJAX_CACHE") == "off":
    return
  folder = hub.cache_dir() / f"xla-{_machine()}"
  try:
    folder.mkdir(exist_ok=True)
  except OSError:
    return
  if os.access(folder, os.W_OK):
    use_compilation_cache(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(_note)
    jax.monitoring.register_event_duration_secs_listener(_tell)


def _note(event: str, **_: str | int) -> None:
  global _missed
  _missed |= event == _MISSED


def _tell(event: str, duration_secs: float, **_: str | int) -> None:
  """Says once that programs are being compiled, when one has taken long.

  What is found in the cache counts as compiled too, so one must be missing.
  """
  global _told
  if (event == _COMPILED and duration_secs > _LONG and _missed
      and not _told):
    _told = True
    print("mcjax: compiling for this machine; the next start will find the "
          f"programs in {hub.cache_dir()}", file=sys.stderr)


def use_compilation_cache(folder: os.PathLike) -> None:
  """Keeps compiled programs in `folder` from now on."""
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  if "://" not in os.fspath(folder):  # not on an object store
    # Where its size is limited, JAX locks the cache: processes may share it.
    jax.config.update("jax_compilation_cache_max_size", _MOST)
    with contextlib.suppress(OSError):  # also where the lock is not had
      _drop_unfinished(pathlib.Path(folder))


def _drop_unfinished(folder: pathlib.Path) -> None:
  """Deletes programs whose writer was killed before it had noted their use.

  JAX (0.11.2) keeps no further program beside one of these.
  """
  if not folder.is_dir():
    return
  with filelock.FileLock(folder / ".lockfile", timeout=_PATIENCE):
    for program in folder.glob("*-cache"):
      used = program.name.removesuffix("-cache") + "-atime"
      if not program.with_name(used).exists():
        program.unlink()


def _machine() -> str:
  """Names this kind of processor: programs hold its instructions."""
  facts = platform.machine()
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith(("flags", "Features")):
        facts += line
        break
  except OSError:
    facts += platform.processor()
  return hashlib.sha256(facts.encode()).hexdigest()[:8]
