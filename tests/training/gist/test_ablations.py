"""Every ablation configuration starts and takes a step on a tiny base."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.configs import gistnet as default
from experiments.configs import gistnet_ablation
from experiments.configs import gistnet_accelerator as accelerator
from mcjax.gist import encoder as gistnet
from mcjax.gist import weights as gist_weights
from mcjax.parallel import sharding
from mcjax.training.gist import trainer as gist_trainer
from mcjax.types import McjaxError


def _small(turn):
  if turn.level == 2:
    return turn
  return dataclasses.replace(turn, window=128, kl_segments=2)


def _trainer(c, tiny_lm, tiny_stores, workdir):
  config = gist_trainer.read_config(c.train, c.objective, c.phases)
  turns = [_small(turn) for turn in config.phases[-1].turns]
  config = dataclasses.replace(
    config, batch=1, micro_batch=1, mesh_data=1,
    phases=(gist_trainer.Phase(2, *turns),))
  network = gist_weights.configure(tiny_lm.params, tiny_lm.config, c.gistnet)
  return gist_trainer.GistTrainer(
    tiny_lm, network, config, tiny_stores, workdir, {"code": 1.0},
    mesh=sharding.make_mesh(1, devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(gistnet_ablation.ABLATIONS))
def test_takes_a_step(name, tiny_lm, tiny_stores, tmp_path):
  if name == "features_4":
    pytest.skip("the tiny base has two layers")
  trainer = _trainer(
    gistnet_ablation.get_config(name), tiny_lm, tiny_stores, tmp_path)
  for _ in trainer.config.phases[0].turns:
    values = trainer.one_step()
    assert np.isfinite(values["loss"]) and values["gradient_norm"] > 0


@pytest.mark.parametrize("name", list(gistnet_ablation.ABLATIONS))
def test_reads(name, tiny_lm):
  c = gistnet_ablation.get_config(name)
  config = gist_trainer.read_config(c.train, c.objective, c.phases)
  assert config.steps == 80
  network = gist_weights.configure(tiny_lm.params, tiny_lm.config, c.gistnet)
  params = jax.eval_shape(lambda: gist_weights.init_params(network))
  assert len(jax.tree.leaves(params)) > 10
  laid_out = sharding.RULES.shardings(  # every parameter has a rule
    "gistnet", params, sharding.make_mesh(1, devices=jax.devices()[:1]),
    int(network.per_level))
  assert jax.tree.structure(laid_out) == jax.tree.structure(params)


@pytest.mark.parametrize("name", ["deep_2", "deep_3", "wide"])
def test_shapes_at_equal_cost(name):
  """Within 2 % of the default's FLOPs for the default base."""
  fields = gistnet_ablation.ABLATIONS[name]["gistnet"]
  cost = [gistnet.flops_per_token(gistnet.GistNetConfig(d_model=576, **f))
          for f in (fields, {})]
  assert cost[0] == pytest.approx(cost[1], rel=0.02)


def test_default_curriculum():
  c = default.get_config("100")
  config = gist_trainer.read_config(c.train, c.objective, c.phases)
  assert config.steps == 100
  upper = [s for s in range(100) if config.objective(s).level == 2]
  assert len(upper) == 8 and min(upper) >= 50
  assert config.tokens(51) == 51 * 4 * 512
  assert config.tokens(100) == 4 * (92 * 512 + 8 * 1088)


def test_accelerator_config():
  c = accelerator.get_config("40")
  config = gist_trainer.read_config(c.train, c.objective, c.phases)
  assert config.steps == 40 and config.batch == config.micro_batch
  assert {config.objective(s).level for s in range(20)} == {1}
  turns = [config.objective(s) for s in range(20, 24)]
  assert {t.level for t in turns} == {1, 2} and any(t.near for t in turns)
  sizes = {k: v for k, v in c.gistnet.items() if v is not None}
  network = gistnet.GistNetConfig(d_model=576, **sizes)
  params = jax.eval_shape(lambda: gist_weights.init_params(network))
  assert max(gistnet.params_per_layer(params).values()) <= 500_000


def test_errors_name_the_setting():
  c = default.get_config("10")
  with pytest.raises(McjaxError, match="no ablation"):
    gistnet_ablation.get_config("depth")
  with pytest.raises(McjaxError, match="config.objective.windo "):
    gist_trainer.read_config(c.train, {"windo": 3}, c.phases)
  with pytest.raises(McjaxError, match="config.train.step "):
    gist_trainer.read_config({"step": 3}, c.objective, c.phases)
