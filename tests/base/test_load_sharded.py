"""A base read straight into the shards of a mesh."""

import jax
import numpy as np
import pytest

from mcjax.base.layout import param_shapes
from mcjax.base.load import load_base_lm
from mcjax.parallel import sharding
from mcjax.testing import tiny_models
from mcjax.types import McjaxError


def _mesh(data, fsdp, tensor):
  return sharding.make_mesh(
    data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  """A folder in shards and a GGUF file of the same family each."""
  folder, out = tmp_path_factory.mktemp("models"), {}
  for name in ("qwen2", "qwen3", "llama"):
    config = tiny_models.CONFIGS[name]
    weights = tiny_models.weights(config)
    out[name] = tiny_models.write_folder(folder / name, config, weights, 2)
    if name != "qwen3":
      out[f"{name}.gguf"] = tiny_models.write_gguf(
        folder / f"{name}.gguf", config, weights)
  return out


@pytest.mark.parametrize("name", [
  "qwen2", "qwen3", "llama", "qwen2.gguf", "llama.gguf"])
def test_shards_hold_what_the_whole_base_holds(sources, name):
  whole = load_base_lm(sources[name])
  spread = load_base_lm(sources[name], mesh=_mesh(2, 2, 2))
  assert spread.fingerprint == whole.fingerprint
  shard = spread.params["layers"]["w_up"].addressable_shards[0].data
  assert shard.shape == (4, 32, 48)
  jax.tree.map(np.testing.assert_array_equal,
               sharding.fetch(spread.params), jax.device_get(whole.params))
  shapes = jax.tree.map(np.shape, whole.params)
  assert shapes == param_shapes(whole.config)


def test_a_mesh_that_does_not_fit_is_refused(sources):
  with pytest.raises(McjaxError, match="does not divide among 3"):
    load_base_lm(sources["llama"], mesh=_mesh(1, 1, 3))


def test_a_cut_file_is_named(sources, tmp_path):
  config = tiny_models.CONFIGS["llama"]
  folder = tiny_models.write_folder(
    tmp_path / "cut", config, tiny_models.weights(config))
  raw = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(raw[:-64])
  with pytest.raises(McjaxError, match="model.safetensors"):
    load_base_lm(folder, mesh=_mesh(1, 2, 1))
