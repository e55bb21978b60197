"""The mesh rules and the checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mcjax.gist import encoder as gistnet
from mcjax.gist import weights as gist_weights
from mcjax.lens import network as lensnet
from mcjax.parallel import sharding
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.parallel.sharding import RULES
from mcjax.training.gist import run_config as gist_config
from mcjax.training.gist.losses import Objective
from mcjax.types import McjaxError


def _mesh(data=1, fsdp=1, tensor=1):
  return sharding.make_mesh(
    data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


def test_every_base_parameter_has_a_rule(tiny_lm):
  specs = RULES.shardings("base", tiny_lm.params, _mesh())
  assert specs["layers"]["wq"].spec == P(None, "fsdp", "tensor", None)
  assert specs["embed"].spec == P("tensor", "fsdp")


def test_every_trained_parameter_and_moment_has_a_rule(tiny_lm, tiny_gistnet):
  mesh = _mesh(fsdp=4)
  config = gist_config.TrainConfig((gist_config.Phase(1, Objective()),))
  for optimizer in ("adamw", "muon"):
    state = gist_config.init_state(
      dataclasses.replace(config, optimizer=optimizer), tiny_gistnet.params)
    found = RULES.shardings("gistnet", state, mesh)
    split = [s for s in jax.tree.leaves(found) if "fsdp" in str(s.spec)]
    assert len(split) > len(jax.tree.leaves(state)) / 3
  lens = lensnet.init_params(lensnet.LensNetConfig(d_model=32))
  found = RULES.shardings("lensnet", lens, mesh)
  assert found["score"]["project_gists"]["kernel"].spec == P("fsdp", None)


def test_weights_per_level_have_one_more_axis():
  config = gistnet.GistNetConfig(d_model=32, width=32, heads=2,
                                 per_level=True, adapter_layers=2)
  params = jax.eval_shape(lambda: gist_weights.init_params(config))
  found = RULES.shardings("gistnet", params, _mesh(fsdp=2), lead=1)
  assert found["w_in"].spec == P(None, "fsdp", None)
  assert found["adapter"]["gain"].spec == P(None, "fsdp")


def test_key_heads_are_replicated_where_tensor_exceeds_them():
  mesh = _mesh(tensor=4)
  assert RULES.spec("base", "layers/wk", (1, 4, 2, 8), mesh) == (
    P(None, "fsdp", None, None))
  assert RULES.kv_sharding((1, 4, 9, 8), mesh).spec == (
    P(None, "tensor", None, None))
  with pytest.raises(McjaxError, match="does not divide"):
    RULES.spec("base", "layers/wk", (1, 4, 3, 8), mesh)


def test_unmatched_colliding_and_uneven_rules_are_errors():
  mesh = _mesh(fsdp=2)
  with pytest.raises(McjaxError, match="no sharding rule matches"):
    RULES.spec("base", "layers/extra", (2, 4), mesh)
  twice = sharding.Rules(base=((".*", P("tensor", "tensor")),))
  with pytest.raises(McjaxError, match="twice"):
    twice.spec("base", "a", (2, 2), mesh)
  long = sharding.Rules(base=((".*", P("tensor", None)),))
  with pytest.raises(McjaxError, match="axes"):
    long.spec("base", "a", (2,), mesh)
  with pytest.raises(McjaxError, match="does not divide"):
    RULES.spec("base", "layers/wq", (1, 9, 4, 8), mesh)


def test_mesh_sizes_must_fit():
  with pytest.raises(McjaxError, match="devices"):
    sharding.make_mesh(3, 1, devices=jax.devices()[:1])
  with pytest.raises(McjaxError, match="positive"):
    sharding.make_mesh(1, 0, devices=jax.devices()[:1])


def test_base_shards_over_the_mesh(tiny_lm):
  mesh = _mesh(fsdp=2, tensor=2)
  placed = sharding.put(
    tiny_lm.params, RULES.shardings("base", tiny_lm.params, mesh))
  shard = placed["layers"]["w_up"].addressable_shards[0].data
  assert shard.shape == (2, 16, 24)
  for got, own in zip(jax.tree.leaves(sharding.fetch(placed)),
                      jax.tree.leaves(tiny_lm.params), strict=True):
    np.testing.assert_array_equal(got, own)


def test_rows_of_a_batch_are_read_once():
  read = []

  def row(i, j):
    read.append((i, j))
    return np.arange(3) + 10 * i + j

  mesh = _mesh(data=2, tensor=2)
  found = sharding.global_rows(
    (2, 4, 3), RULES.batch_sharding(mesh, axis=1), row)
  assert sorted(read) == [(i, j) for i in range(2) for j in range(4)]
  np.testing.assert_array_equal(found[1, 2], [12, 13, 14])
  assert found.addressable_shards[0].data.shape == (2, 2, 3)


def test_checkpoint_round_trip_and_config(tmp_path):
  state = {"a": jnp.arange(4.0), "step": jnp.int32(3)}
  saved = Checkpoints(tmp_path, {"seed": 1, "lr": 0.1})
  assert saved.restore(state) is None
  saved.save(3, state)
  saved.save(3, state, wait=True)
  saved.close()
  opened = Checkpoints(tmp_path, {"seed": 1, "lr": 0.5})
  found = opened.restore(jax.tree.map(jnp.zeros_like, state), ("seed",))
  jax.tree.map(np.testing.assert_array_equal, found, state)
  with pytest.raises(McjaxError, match="lr=0.1"):
    opened.restore(state, ("lr",))
  with pytest.raises(McjaxError, match="does not fit"):
    opened.restore({"a": jnp.zeros((5,)), "step": jnp.int32(0)})
  opened.close()


def test_only_the_newest_are_kept(tmp_path):
  saved = Checkpoints(tmp_path, {}, keep=2)
  for step in range(5):
    saved.save(step, {"a": jnp.float32(step)}, wait=True)
  assert saved.latest_step() == 4
  assert len(list(tmp_path.glob("[0-9]*"))) == 2
  saved.close()
