"""What every test shares: eight host devices, a strict JAX, two bases.

Compiling is most of what the tests cost. So LLVM does not optimise here (half
the time of a compilation), and a program is compiled once: it is kept in the
user cache, for the other processes of a run and for the next run.
"""

import os
import uuid

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
  os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
]).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Shapes and dtypes of signatures are checked at every call, in tests alone.
jaxtyping.install_import_hook(
  ["mcjax.base", "mcjax.tree", "mcjax.gist", "mcjax.window", "mcjax.lens"],
  "shapes.check")
from runtime_cases import SMALL  # noqa: E402

from mcjax import Config, MegaContext  # noqa: E402
from mcjax.base import compilation_cache, hub  # noqa: E402
from mcjax.base.load import load_base_lm  # noqa: E402
from mcjax.testing import object_store, tiny_base  # noqa: E402

compilation_cache.use_compilation_cache(hub.cache_dir() / "xla-tests")
for name, value in {
  "jax_compilation_cache_dir": str(hub.cache_dir() / "xla-tests"),
  "jax_compilation_cache_max_size": 1 << 30,  # bytes
  "jax_persistent_cache_min_compile_time_secs": 0.1,
}.items():
  jax.config.update(name, value)
  os.environ[name.upper()] = str(value)  # of the processes that tests start
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run; failures do not come and go.
hypothesis.settings.register_profile("mcjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mcjax")


def pytest_collection_modifyitems(items):
  """Marks what needs the default base; `-m "not network"` runs the rest."""
  for item in items:
    if "smollm2" in item.fixturenames:
      item.add_marker(pytest.mark.network)


@pytest.fixture(scope="session")
def tiny_lm():
  """A random two-layer base; one token a byte, no stop token, no template."""
  return tiny_base.make_lm()


@pytest.fixture(scope="session")
def tiny_gistnet(tiny_lm):
  """A GistNet of `tiny_lm`, away from its last-token start."""
  return tiny_base.gistnet(tiny_lm, spread=0.05)


@pytest.fixture(scope="session")
def smollm2():
  """The embedded default base; tools/test fetches it first."""
  return load_base_lm("smollm2-135m")


@pytest.fixture
def memory_url():
  """A place in memory of this test's own."""
  return tiny_base.memory_url()


@pytest.fixture(scope="session")
def s3_server():
  """The environment of an S3-compatible server on loopback."""
  with object_store.serve() as environment:
    yield environment


@pytest.fixture
def s3_url(s3_server, monkeypatch):
  """A place in a bucket of this test's own."""
  for name, value in s3_server.items():
    monkeypatch.setenv(name, value)
  return f"s3://{object_store.BUCKET}/{uuid.uuid4()}"


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
  """A place for a tree, in memory and on disk; "s3" where a test asks."""
  if request.param == "memory":
    return tiny_base.memory_url()
  if request.param == "s3":
    return request.getfixturevalue("s3_url")
  return str(tmp_path / "tree")


@pytest.fixture
def make(tiny_lm, tiny_gistnet):
  """A MegaContext of the tiny base; keyword arguments go to its Config."""
  opened = []

  def create(url=None, lm=tiny_lm, gistnet=tiny_gistnet, **config):
    mc = MegaContext.create(
      url or tiny_base.memory_url(), lm, Config(**{**SMALL, **config}),
      gistnet=gistnet,
    )
    opened.append(mc)
    return mc

  yield create
  for mc in opened:
    mc.close()
