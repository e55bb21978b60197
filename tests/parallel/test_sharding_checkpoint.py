"""The mesh rules and the checkpoints."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mcjax.parallel import sharding
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.types import McjaxError


def _mesh():
  return sharding.make_mesh(1, 1, jax.devices()[:1])


def test_every_base_parameter_has_a_rule(tiny_lm):
  specs = sharding.BASE_RULES.shardings(tiny_lm.params, _mesh())
  assert specs["layers"]["wq"].spec == P(None, None, "model", None)
  assert specs["embed"].spec == P("model", None)


def test_unmatched_colliding_and_uneven_rules_are_errors():
  mesh = _mesh()
  with pytest.raises(McjaxError, match="no sharding rule matches"):
    sharding.BASE_RULES.spec("layers/extra", (2, 4), mesh)
  twice = sharding.Rules(((".*", P("model", "model")),))
  with pytest.raises(McjaxError, match="twice"):
    twice.spec("a", (2, 2), mesh)
  long = sharding.Rules(((".*", P("model", None)),))
  with pytest.raises(McjaxError, match="axes"):
    long.spec("a", (2,), mesh)
  if jax.device_count() >= 2:
    pair = sharding.make_mesh(1, 2, jax.devices()[:2])
    with pytest.raises(McjaxError, match="does not divide"):
      sharding.BASE_RULES.spec("layers/wq", (1, 4, 9, 8), pair)


def test_mesh_sizes_must_fit():
  with pytest.raises(McjaxError, match="devices"):
    sharding.make_mesh(3, 1, jax.devices()[:1])
  with pytest.raises(McjaxError, match="positive"):
    sharding.make_mesh(1, 0, jax.devices()[:1])


def test_base_shards_over_two_devices(tiny_lm):
  config_free = {k: v for k, v in tiny_lm.params.items() if k != "embed"}
  mesh = sharding.make_mesh(1, 2, jax.devices()[:2])
  placed = jax.device_put(
    config_free, sharding.BASE_RULES.shardings(config_free, mesh))
  assert len(placed["layers"]["w_up"].addressable_shards) == 2
  assert placed["layers"]["w_up"].addressable_shards[0].data.shape[-1] == 24


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
