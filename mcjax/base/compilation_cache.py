"""XLA programs kept on disk, so that the next start compiles nothing."""

from __future__ import annotations

import pathlib

import jax


def use_compilation_cache(folder: pathlib.Path) -> None:
  """Keeps compiled programs in `folder` from now on."""
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
