"""Planning a run from a config.json alone."""

import json
import pathlib

import jax
import pytest

from mcjax.base.config import decoder_config_from_hf
from mcjax.base.load import load_base_lm, load_decoder_config
from mcjax.cli import configs
from mcjax.gist import weights as gist_weights
from mcjax.testing import tiny_models
from mcjax.training import plan
from mcjax.training.gist import run_config
from mcjax.training.gist.losses import Objective
from mcjax.types import McjaxError

_TRAIN = run_config.TrainConfig(
  (run_config.Phase(1, Objective()),), batch=16, micro_batch=8)
_LLAMA_70B = dict(
  model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=8192,
  intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
  num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
  rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False)


def test_a_70b_base_on_64_devices(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(_LLAMA_70B))
  base = load_decoder_config(tmp_path)
  rows = plan.plan(base, plan.abstract_mesh(1, 8, 8), _TRAIN, {})
  found = {r.name: r for r in rows}["base, bfloat16"]
  assert found.whole == 2 * 70_553_706_496
  assert found.device < 1.005 * found.whole / 64  # norms are replicated
  assert found.device <= 6 * 2**30
  assert "sum, activations besides" in plan.table(rows)


def test_the_plan_is_what_loading_takes(tmp_path):
  config = tiny_models.CONFIGS["qwen3"]
  tiny_models.write_folder(tmp_path, config, tiny_models.weights(config))
  lm = load_base_lm(tmp_path)
  base = load_decoder_config(tmp_path / "config.json")
  assert base == lm.config
  rows = plan.plan(base, plan.abstract_mesh(1, 1, 1), _TRAIN, {}, "float32")
  found = {r.name: r.whole for r in rows}
  assert found["base, float32"] == sum(
    a.nbytes for a in jax.tree.leaves(lm.params))
  params = gist_weights.init_params(
    gist_weights.default_config(lm.params, lm.config))
  assert found["GistNet, parameters"] == sum(
    a.nbytes for a in jax.tree.leaves(params))


@pytest.mark.parametrize("name", [
  "gistnet", "gistnet_accelerator", "gistnet_adapter",
  "gistnet_adapter_accelerator", "gistnet_finetune",
  "gistnet_loop", "gistnet_tiny"])
def test_every_configuration_follows_the_base(name):
  """Widths and adapter layers of the 70B base, and of a tiny one."""
  folder = pathlib.Path(plan.__file__).parents[2] / "experiments" / "configs"
  c = configs.load(str(folder / f"{name}.py"))
  for hf in (_LLAMA_70B, tiny_models.CONFIGS["llama"]):
    base = decoder_config_from_hf(hf)
    sizes = gist_weights.configure(None, base, {**c.gistnet, "input_rms": 1.0})
    assert sizes.d_model == base.d_model
    assert sizes.adapter_layers == base.n_layers
    assert sizes.heads == max(1, round(base.d_model / 96))
    assert sizes.width == 32 * sizes.heads


def test_what_does_not_divide_is_named():
  base = decoder_config_from_hf(_LLAMA_70B)
  with pytest.raises(McjaxError, match="layers/.* does not divide among 3"):
    plan.plan(base, plan.abstract_mesh(1, 1, 3), _TRAIN, {})
  with pytest.raises(McjaxError, match="micro_batch=8 does not divide"):
    plan.plan(base, plan.abstract_mesh(16, 1, 1), _TRAIN, {})
