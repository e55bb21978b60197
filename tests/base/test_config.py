"""Configurations that are refused, each by the name of its field."""

import copy

import pytest

from mcjax.base.config import decoder_config_from_hf
from mcjax.testing import tiny_models
from mcjax.types import McjaxError


def _changed(case: str, changes: dict) -> dict:
  config = copy.deepcopy(tiny_models.CONFIGS[case])
  for key, value in changes.items():
    if value is ...:
      del config[key]
    else:
      config[key] = value
  return config


@pytest.mark.parametrize(
  "case, changes, words",
  [
    ("llama", {"model_type": "gpt2"}, "model_type='gpt2'"),
    ("llama", {"model_type": ...}, "model_type=None"),
    (
      "llama",
      {"architectures": ["LlamaForTokenClassification"]},
      "architectur",
    ),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"hidden_size": ...}, "hidden_size"),
    ("llama", {"hidden_size": "64"}, "hidden_size"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama", {"num_key_value_heads": 3}, "3 key heads"),
    ("llama", {"head_dim": 7}, "head_dim"),
    ("llama", {"rms_norm_eps": ...}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (
      "llama",
      {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
      "partial_rotary_factor=0.5",
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn'"),
    (
      "llama",
      {"rope_scaling": {"rope_type": "dynamic"}},
      "rope_type='dynamic'",
    ),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='long"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "'factor'"),
    (
      "llama",
      {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
      "rope_parameters",
    ),
    ("llama", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "'awq'"),
    ("mistral", {"sliding_window": 64}, "sliding_window=64"),
    (
      "mistral",
      {"sliding_window": ..., "max_position_embeddings": 8192},
      "4096",
    ),
    ("mistral", {"num_key_value_heads": ...}, "num_key_value_heads"),
    ("qwen2", {"use_sliding_window": True}, "sliding_window=16"),
    ("qwen2", {"rope_theta": ...}, "rope_theta"),
    (
      "qwen3",
      {"layer_types": ["full_attention", "sliding_attention"]},
      "layer_types='sliding_attention'",
    ),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2"),
  ],
)
def test_refused_by_name(case, changes, words):
  with pytest.raises(McjaxError) as caught:
    decoder_config_from_hf(_changed(case, changes))
  assert words in str(caught.value)
  assert "\n" not in str(caught.value)


def test_idle_settings_are_accepted():
  idle = {
    "attention_dropout": 0.1,
    "layer_types": ["full_attention"] * 4,
    "sliding_window": 16,
    "use_sliding_window": True,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "pretraining_tp": 2,
  }
  config = decoder_config_from_hf(_changed("qwen2", idle))
  assert config == decoder_config_from_hf(tiny_models.CONFIGS["qwen2"])


def test_defaults_of_each_family():
  read = decoder_config_from_hf
  old = _changed("llama", {"num_key_value_heads": ..., "rope_theta": ...})
  assert read(old).n_kv_heads == 4 and read(old).rope_theta == 10000
  assert read(_changed("qwen3", {"head_dim": ...})).head_dim == 128
  assert read(_changed("smollm3", {"tie_word_embeddings": ...})).tie_embeddings
  nope = _changed("smollm3", {"no_rope_layers": ...})
  assert read(nope).nope_layers == (3,)
  nope["no_rope_layer_interval"] = 2
  assert read(nope).nope_layers == (1, 3)


def test_config_is_hashable_and_clean():
  config = decoder_config_from_hf(
    _changed("llama", {"rms_norm_eps": 9.999999747378752e-06})
  )
  assert config.rms_norm_eps == 1e-5
  assert hash(config) == hash(
    decoder_config_from_hf(tiny_models.CONFIGS["llama"])
  )
