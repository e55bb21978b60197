"""An engine on a mesh: the same answers, its rows and heads truly apart."""

import dataclasses

import jax
import pytest
from runtime_cases import QUESTION, SMALL, ask_at_once, life_of, lived_together

from mcjax import Config, Engine, McjaxError
from mcjax.parallel import sharding
from mcjax.runtime.telemetry import compile_count


def mesh_of(data, fsdp, tensor):
  return sharding.make_mesh(
    data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


def spread(lm, mesh):
  """The base as if it had been loaded on a mesh."""
  return dataclasses.replace(lm, params=sharding.put(
    lm.params, sharding.RULES.shardings("base", lm.params, mesh)))


@pytest.mark.parametrize("sizes, loaded, count, splices", [
  ((4, 1, 2), True, 3, 2),
  pytest.param((2, 2, 2), False, 8, 1, marks=pytest.mark.slow),
  pytest.param((2, 1, 4), True, 8, 4, marks=pytest.mark.slow),
])
def test_many_on_a_mesh_say_what_each_says_alone(
    tiny_lm, tiny_gistnet, lives_alone, sizes, loaded, count, splices):
  """With more devices than key heads too; nothing compiles once warm."""
  mesh, expected = mesh_of(*sizes), lives_alone(count)
  lm = spread(tiny_lm, mesh) if loaded else tiny_lm
  with Engine(lm, Config(**SMALL), slots=8, splices=splices,
              gistnet=tiny_gistnet, mesh=None if loaded else mesh) as engine:
    engine.warm_up()
    before = compile_count()
    assert lived_together(engine, count, life_of) == expected
    ask_at_once(engine, 6)
    assert compile_count() == before
    done, runs = engine.spliced
    assert done > runs
    parts, heads = sizes[0] * sizes[1], 2 if sizes[2] > 2 else 1
    for cache in engine._decoder._caches:
      for array in jax.tree.leaves(cache.take()):
        shards = array.addressable_shards
        assert array.shape[:2] == (8, 2) and len(shards) == mesh.size
        assert {s.data.shape[:2] for s in shards} == {(8 // parts, heads)}
        assert len({s.index[0].start for s in shards}) == parts
    mc = engine.histories[0]  # all rows are lost now
    again = [mc.generate(QUESTION, 9, remember=False).text for _ in range(2)]
    assert again[0] == again[1] and mc.context.decoder.lost


def test_what_does_not_divide_is_told_in_a_line(tiny_lm, tiny_gistnet):
  mesh = mesh_of(4, 1, 1)
  with pytest.raises(McjaxError, match="slots=6 do not divide among 4 devices"):
    Engine(tiny_lm, slots=6, gistnet=tiny_gistnet, mesh=mesh)
  with pytest.raises(McjaxError, match=r"splices must be .* in \[1, 2\]"):
    Engine(tiny_lm, slots=8, splices=3, gistnet=tiny_gistnet, mesh=mesh)
  with pytest.raises(McjaxError, match="policy oracle runs the base on one"):
    Engine(spread(tiny_lm, mesh), Config(policy="oracle"), slots=8,
           gistnet=tiny_gistnet)
