"""Compiled programs kept on disk, by default and as the user says."""

import jax
from jax._src import lru_cache
import pytest

from mcjax.base import compilation_cache, hub

_SETTINGS = (
  "jax_compilation_cache_dir", "jax_compilation_cache_max_size",
  "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def unset(monkeypatch, tmp_path):
  """JAX as if nobody had chosen a cache; the user cache is `tmp_path`."""
  before = {name: getattr(jax.config, name) for name in _SETTINGS}
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("MCJAX_CACHE", str(tmp_path))
  for listen in ("register_event_listener",
                 "register_event_duration_secs_listener"):
    # None stays in this process: it would tell of what other tests compile.
    monkeypatch.setattr(jax.monitoring, listen, lambda _: None)
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_in_the_user_cache(unset):
  compilation_cache.keep_programs()
  folder = jax.config.jax_compilation_cache_dir
  assert folder.startswith(f"{unset}/xla-")
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  assert jax.config.jax_compilation_cache_max_size > 0  # so JAX takes a lock


def test_a_program_whose_writer_was_killed_is_dropped(unset):
  """JAX would store no other one beside it."""
  for name in ("whole-cache", "whole-atime", "torn-cache", "old-atime"):
    (unset / name).write_bytes(b"\0" * 8)
  compilation_cache.use_compilation_cache(unset)
  found = {path.name for path in unset.glob("*-*")}
  assert found == {"whole-cache", "whole-atime", "old-atime"}
  jax_cache = lru_cache.LRUCache(str(unset), max_size=1 << 20)
  jax_cache.put("new", b"program")
  assert jax_cache.get("new") == b"program"


def test_the_switch_keeps_none_and_leaves_the_weights_their_place(
  unset, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(unset))
  monkeypatch.setenv("MCJAX_CACHE", "off")
  compilation_cache.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None
  assert hub.cache_dir() == unset / "mcjax"


def test_a_cache_that_the_user_chose_stays(unset):
  jax.config.update("jax_compilation_cache_dir", "/else/where")
  compilation_cache.keep_programs()
  assert jax.config.jax_compilation_cache_dir == "/else/where"
  assert not list(unset.iterdir())


def test_a_cache_that_cannot_be_written_is_left_alone(unset, monkeypatch):
  monkeypatch.setattr(compilation_cache.os, "access", lambda *_: False)
  compilation_cache.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None


def test_the_user_is_told_once(monkeypatch, capsys):
  for name in ("_told", "_missed"):
    monkeypatch.setattr(compilation_cache, name, False)
  compilation_cache._tell(compilation_cache._COMPILED, 9.0)  # it was found
  assert not capsys.readouterr().err
  compilation_cache._note(compilation_cache._MISSED)
  for event, seconds in (("else", 9.0), (compilation_cache._COMPILED, 0.1),
                         (compilation_cache._COMPILED, 3.0),
                         (compilation_cache._COMPILED, 4.0)):
    compilation_cache._tell(event, seconds)
  assert capsys.readouterr().err.count("compiling") == 1
