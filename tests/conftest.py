"""What every test shares: eight host devices, a strict JAX, two bases."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
  os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
]).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import tiny_base  # noqa: E402

from mcjax.base.load import load_base_lm  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run; failures do not come and go.
hypothesis.settings.register_profile("mcjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mcjax")


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
