"""What the training commands share."""

from absl import flags
from absl.testing import flagsaver
import jax
import pytest

from mcjax.cli import training
from mcjax.types import McjaxError

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


@pytest.mark.parametrize("workdir_is_new, kept, says", [
  (True, "", None), (False, "", []),
  (True, "metrics.jsonl", ["compiled", "metrics.jsonl"])])
def test_a_run_that_kept_nothing_leaves_no_programs(
    settings, tmp_path, workdir_is_new, kept, says):
  workdir = tmp_path / "run"
  if not workdir_is_new:
    workdir.mkdir()

  def main(argv):
    training.keep_programs(str(workdir))
    (workdir / "compiled").mkdir(parents=True)  # as JAX does
    (workdir / "compiled" / "program").touch()
    if kept:
      (workdir / kept).touch()
    raise McjaxError("no text")

  with pytest.raises(McjaxError, match="no text"):
    training._status(main, [])
  left = sorted(p.name for p in workdir.iterdir()) if workdir.exists() else None
  assert left == says
