"""Configurations that are refused, each by the name of its field."""

import copy

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.base.config import decoder_config_from_hf, folds_from_hf
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
      {"rope_parameters": {"rope_theta": 2.0, "partial_rotary_factor": 0.5}},
      "partial_rotary_factor=0.5",
    ),
    ("llama", {"rope_scaling": {"type": "linear"}}, "'factor'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "'factor'"),
    (
      "llama",
      {"rope_scaling": {"rope_type": "dynamic"}},
      "rope_type='dynamic'",
    ),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "short_factor"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "'factor'"),
    (
      "llama",
      {"rope_parameters": {"full_attention": {"rope_theta": 2.0}}},
      "rope_parameters",
    ),
    ("llama", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "'awq'"),
    ("mistral", {"num_key_value_heads": ...}, "num_key_value_heads"),
    ("llama", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types='chunk"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "softcapping=30.0"),
    ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    ("qwen2", {"rope_theta": ...}, "rope_theta"),
    (
      "qwen3",
      {"layer_types": ["full_attention", "sliding_attention"]},
      "layer_types",
    ),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2"),
  ],
)
def test_refused_by_name(case, changes, words):
  with pytest.raises(McjaxError) as caught:
    decoder_config_from_hf(_changed(case, changes))
  assert words in str(caught.value)
  assert "\n" not in str(caught.value)


# Sizes that no model has; each is told before any memory is taken.
_ABSURD = dict(
  hidden_size=[0, -1, 1 << 40, True, 1.5, "64", None, [64], float("nan")],
  num_hidden_layers=[10**9, -3], num_attention_heads=[1 << 30, 0],
  num_key_value_heads=[1 << 30, "2"], head_dim=[1 << 30, 7, 0],
  intermediate_size=[1 << 40], vocab_size=[1 << 40, 0],
  max_position_embeddings=[1 << 60, 0],
  rms_norm_eps=[float("nan"), float("inf"), 0, -1e-5, 10.0, 10**400],
  rope_theta=[0, -1, float("nan"), float("inf"), 1.0, 10**400, [1e4]],
  rope_scaling=["linear", {"rope_type": ["yarn"], "factor": 2},
                {"rope_type": "linear", "factor": 0},
                {"rope_type": "yarn", "factor": float("nan")},
                {"rope_type": "yarn", "factor": 2, "beta_fast": -1}],
  model_type=[["llama"], 3, {}],
  layer_types=["full_attention", [3] * 4, ["full_attention"] * 3],
)


@pytest.mark.parametrize("field", _ABSURD)
def test_absurd_values_are_refused_by_name(field):
  for value in _ABSURD[field]:
    changed = _changed("llama", {field: value})
    with pytest.raises(McjaxError) as caught:
      decoder_config_from_hf(changed)
    told = str(caught.value)
    known = (field, "rope_type", "factor", "beta_fast")
    assert any(name in told for name in known), told
    assert "\n" not in told and len(told) < 400


_VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
  | st.sampled_from([10**9, "linear", "yarn", "longrope", "llama3", 64, 0.5]),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(["rope_type", "factor", "full_attention", "rope_theta"]),
    inner, max_size=3),
  max_leaves=6)


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.sampled_from(sorted(tiny_models.CONFIGS)), st.data())
def test_fuzz(case, data):
  """Any values in any fields: a configuration, or one line."""
  config = copy.deepcopy(tiny_models.CONFIGS[case])
  extra = ["rope_scaling", "rope_parameters", "layer_types", "sliding_window",
           "no_rope_layers", "head_dim", "query_pre_attn_scalar",
           "use_sliding_window", "max_window_layers", "architectures",
           "embedding_multiplier", "sliding_window_pattern"]
  fields = st.sampled_from(sorted({*config, *extra}))
  config.update(data.draw(st.dictionaries(fields, _VALUES, max_size=3)))
  try:
    read = decoder_config_from_hf(config)
    folds_from_hf(config)
  except McjaxError as e:
    assert "\n" not in str(e)
  else:
    assert read.n_layers <= 1024 and np.isfinite(read.rope_theta)
    assert hash(read) == hash(decoder_config_from_hf(config))


def test_local_layers_of_each_family():
  read = decoder_config_from_hf
  assert read(_changed("mistral", {"sliding_window": 64})).local_window == 64
  long = {"sliding_window": ..., "max_position_embeddings": 8192}
  assert read(_changed("mistral", long)).local_layers == (0, 1, 2, 3)
  woken = {"use_sliding_window": True, "max_window_layers": 2}
  assert read(_changed("qwen2", woken)).local_layers == (2, 3)
  types = ["sliding_attention", "full_attention"] * 2
  woken = {"use_sliding_window": True, "sliding_window": 8,
           "layer_types": types}
  assert read(_changed("qwen3", woken)).local_layers == (0, 2)
  gemma = {"layer_types": ..., "num_hidden_layers": 7}
  assert read(_changed("gemma3", gemma)).local_layers == (0, 1, 2, 3, 4, 6)


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
