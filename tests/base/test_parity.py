"""The decoder and loaders against transformers: stored logits, then live.

Every bound is 1e-4 of the largest logit.
"""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import model
from mcjax.base.load import load_base_lm
from mcjax.testing import tiny_models

_BOUND = 1e-4
_TEXT = pathlib.Path(__file__).parent / "goldens" / "text.txt"


def _relative(got, want) -> float:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.abs(got - want).max() / np.abs(want).max()


def _logits(lm, ids) -> np.ndarray:
  return np.asarray(model.logits(lm.params, lm.config, jnp.asarray(ids)))


@pytest.mark.parametrize("case", tiny_models.CONFIGS)
def test_tiny_matches_stored_logits(case, tmp_path, goldens):
  config = tiny_models.CONFIGS[case]
  folder = tiny_models.write_folder(
    tmp_path / "m", config, tiny_models.weights(config)
  )
  got = _logits(load_base_lm(folder), tiny_models.token_ids())
  assert _relative(got, goldens[f"tiny/{case}"]) < _BOUND


@pytest.mark.parametrize(
  "case, change",
  [("llama3_rope", {"rope_scaling": None}), ("smollm3", {"nope_layers": ()})],
)
def test_bound_notices_a_wrong_switch(case, change, tmp_path, goldens):
  config = tiny_models.CONFIGS[case]
  folder = tiny_models.write_folder(
    tmp_path / "m", config, tiny_models.weights(config)
  )
  lm = load_base_lm(folder)
  lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, **change))
  got = _logits(lm, tiny_models.token_ids())
  assert _relative(got, goldens[f"tiny/{case}"]) > 100 * _BOUND


def test_smollm2_encodes_as_stored(smollm2, goldens):
  ids = smollm2.tokenizer.encode(_TEXT.read_text(encoding="utf-8"))
  np.testing.assert_array_equal(ids, goldens["smollm2/ids"])


def test_smollm2_matches_stored_logits(smollm2, goldens):
  ids, rows = goldens["smollm2/ids"], goldens["smollm2/rows"]
  got = _logits(smollm2, ids)
  want = goldens["smollm2/logits"]
  assert _relative(got[rows][:, goldens["smollm2/columns"]], want) < _BOUND
  top = np.take_along_axis(got[rows], goldens["smollm2/top_ids"], axis=1)
  assert _relative(top, goldens["smollm2/top"]) < _BOUND
  np.testing.assert_array_equal(
    got[rows].argmax(1), goldens["smollm2/top_ids"][:, 0]
  )
  top = got.max(axis=1, keepdims=True)
  normal = top[:, 0] + np.log(np.exp(got - top).sum(axis=1))
  nll = normal[:-1] - got[np.arange(len(ids) - 1), ids[1:]]
  assert _relative(nll, goldens["smollm2/nll"]) < _BOUND


@pytest.mark.slow
@pytest.mark.network
def test_gemma_matches_stored_logits(goldens):
  """The real model, its own file; ids too are those of transformers."""
  gemma = load_base_lm("gemma-3-270m")
  ids, rows = goldens["gemma/ids"], goldens["gemma/rows"]
  encoded = gemma.tokenizer.encode(_TEXT.read_text(encoding="utf-8"))
  assert ids[0] == gemma.tokenizer.bos_id
  np.testing.assert_array_equal(encoded[: len(ids) - 1], ids[1:])
  got = _logits(gemma, ids)[rows]
  assert _relative(
    got[:, goldens["gemma/columns"]], goldens["gemma/logits"]) < _BOUND
  top = np.take_along_axis(got, goldens["gemma/top_ids"], axis=1)
  assert _relative(top, goldens["gemma/top"]) < _BOUND
  np.testing.assert_array_equal(
    got.argmax(1), goldens["gemma/top_ids"][:, 0])


def test_bfloat16_is_close(tmp_path, goldens):
  config = tiny_models.CONFIGS["qwen3"]
  folder = tiny_models.write_folder(
    tmp_path / "m", config, tiny_models.weights(config)
  )
  lm = load_base_lm(folder, dtype="bfloat16")
  assert lm.params["layers"]["attn_norm"].dtype == jnp.bfloat16
  got = _logits(lm, tiny_models.token_ids())
  assert _relative(got, goldens["tiny/qwen3"]) < 0.05
  assert lm.fingerprint == load_base_lm(folder).fingerprint


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", tiny_models.CONFIGS)
def test_tiny_matches_pytorch(case, sharded, tmp_path):
  """A model that transformers itself initialised and saved."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(3)
  settings = dict(tiny_models.CONFIGS[case])
  kind = settings.pop("model_type")
  config = transformers.AutoConfig.for_model(kind, **settings)
  config.initializer_range = 0.2
  reference = transformers.AutoModelForCausalLM.from_config(
    config, attn_implementation="eager"
  ).eval()
  size = "60KB" if sharded else "5GB"
  reference.save_pretrained(tmp_path, max_shard_size=size)
  assert (tmp_path / "model.safetensors").exists() != sharded
  tiny_models.write_tokenizer(tmp_path)
  ids = tiny_models.token_ids()
  with torch.no_grad():
    want = reference(torch.tensor(ids)[None].long()).logits[0].numpy()
  assert _relative(_logits(load_base_lm(tmp_path), ids), want) < _BOUND


@pytest.mark.filterwarnings("default")
def test_smollm2_matches_pytorch(smollm2, tmp_path):
  """Both run the weights that mcjax loaded, on 128 tokens."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  c = smollm2.config
  config = transformers.LlamaConfig(
    vocab_size=c.vocab_size,
    hidden_size=c.d_model,
    intermediate_size=c.d_ff,
    num_hidden_layers=c.n_layers,
    num_attention_heads=c.n_heads,
    num_key_value_heads=c.n_kv_heads,
    max_position_embeddings=c.max_positions,
    rms_norm_eps=c.rms_norm_eps,
    rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"},
    tie_word_embeddings=True,
  )
  reference = transformers.LlamaForCausalLM(config).eval()
  state = {
    name: torch.tensor(value) for name, value in _hf_state(smollm2).items()
  }
  missing, unexpected = reference.load_state_dict(state, strict=False)
  assert not unexpected and set(missing) <= {"lm_head.weight"}
  ids = smollm2.tokenizer.encode(_TEXT.read_text(encoding="utf-8"))[:128]
  with torch.no_grad():
    want = reference(torch.tensor(ids)[None].long()).logits[0].numpy()
  assert _relative(_logits(smollm2, ids), want) < _BOUND


def _hf_state(lm) -> dict[str, np.ndarray]:
  """The stacked parameters under Llama's Hugging Face names."""
  d = lm.config.d_model
  layers = {k: np.asarray(v) for k, v in lm.params["layers"].items()}
  out = {
    "model.embed_tokens.weight": np.asarray(lm.params["embed"]),
    "model.norm.weight": np.asarray(lm.params["final_norm"]),
  }
  for i in range(lm.config.n_layers):
    p = f"model.layers.{i}."
    out[p + "input_layernorm.weight"] = layers["attn_norm"][i]
    out[p + "post_attention_layernorm.weight"] = layers["mlp_norm"][i]
    for name in "qkv":
      rows = layers["w" + name][i].transpose(1, 2, 0).reshape(-1, d)
      out[f"{p}self_attn.{name}_proj.weight"] = rows
    out[p + "self_attn.o_proj.weight"] = layers["wo"][i].reshape(-1, d).T
    for name in ("gate", "up", "down"):
      out[f"{p}mlp.{name}_proj.weight"] = layers["w_" + name][i].T
  return out


def test_config_spellings_agree():
  """transformers 4 and 5 write the same model in two ways."""
  from mcjax.base.config import decoder_config_from_hf

  new, old = (
    decoder_config_from_hf(json.loads(json.dumps(tiny_models.CONFIGS[case])))
    for case in ("llama3_rope", "llama3_rope_v4")
  )
  assert new == old and new.rope_scaling.factor == 8
