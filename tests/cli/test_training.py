"""What the training commands share."""

from absl import flags
from absl.testing import flagsaver
import jax
import pytest

from mcjax.cli import training

_NAMES = ("jax_compilation_cache_dir", "jax_enable_compilation_cache",
          "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def settings():
  """JAX's settings, as they were behind the test."""
  before = {name: getattr(jax.config, name) for name in _NAMES}
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  yield jax.config
  for name, value in before.items():
    jax.config.update(name, value)


def test_compiled_programs_lie_where_the_flag_says(settings, tmp_path):
  training.keep_programs(str(tmp_path / "run"))
  assert settings.jax_compilation_cache_dir == str(tmp_path / "run/compiled")
  with flagsaver.flagsaver(compile_cache=str(tmp_path / "shared")):
    training.keep_programs(str(tmp_path / "run"))
  assert settings.jax_compilation_cache_dir == str(tmp_path / "shared")
  assert settings.jax_enable_compilation_cache
  with flagsaver.flagsaver(compile_cache="off"):
    training.keep_programs(str(tmp_path / "run"))
  assert not settings.jax_enable_compilation_cache
