"""Tiny models of every family: seeded weights, folders and GGUF files.

Weights come from NumPy's frozen RandomState, so that stored logits stay valid
without the framework that computed them.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

TOKENS = 40  # length of the ids that parity is checked on
_COMMON = dict(
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  vocab_size=272,
  max_position_embeddings=128,
  rms_norm_eps=1e-5,
  hidden_act="silu",
)
_LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)


def _config(kind: str, architecture: str, **changes) -> dict:
  return {
    "model_type": kind,
    "architectures": [architecture],
    **_COMMON,
    "tie_word_embeddings": False,
    **changes,
  }


CONFIGS = {
  "llama": _config("llama", "LlamaForCausalLM", rope_theta=10000.0),
  "llama_tied_biased": _config(
    "llama",
    "LlamaForCausalLM",
    rope_theta=500.0,
    attention_bias=True,
    tie_word_embeddings=True,
  ),
  "llama3_rope": _config(
    "llama",
    "LlamaForCausalLM",
    rope_parameters={"rope_theta": 5000.0, **_LLAMA3},
  ),
  "llama3_rope_v4": _config(
    "llama", "LlamaForCausalLM", rope_theta=5000.0, rope_scaling=_LLAMA3
  ),
  "mistral": _config(
    "mistral",
    "MistralForCausalLM",
    head_dim=32,
    rope_theta=10000.0,
    sliding_window=None,
  ),
  "qwen2": _config(
    "qwen2",
    "Qwen2ForCausalLM",
    rope_theta=10000.0,
    tie_word_embeddings=True,
    use_sliding_window=False,
    sliding_window=16,
  ),
  "qwen3": _config(
    "qwen3",
    "Qwen3ForCausalLM",
    head_dim=32,
    rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
  ),
  "mistral_local": _config(
    "mistral", "MistralForCausalLM", rope_theta=10000.0, sliding_window=8),
  "qwen2_yarn": _config(
    "qwen2",
    "Qwen2ForCausalLM",
    rope_theta=1000.0,
    rope_scaling=dict(
      rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
  ),
  "llama_linear": _config(
    "llama",
    "LlamaForCausalLM",
    rope_theta=1000.0,
    rope_scaling=dict(rope_type="linear", factor=3.0),
  ),
  "gemma3": _config(
    "gemma3_text",
    "Gemma3ForCausalLM",
    head_dim=32,
    hidden_activation="gelu_pytorch_tanh",
    layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2,
    sliding_window=8,
    rope_theta=50000.0,
    rope_local_base_freq=100.0,
    rope_scaling=dict(rope_type="linear", factor=2.0),
    query_pre_attn_scalar=24,
    tie_word_embeddings=True,
  ),
  # As a GGUF file can say it: every sixth layer is global.
  "gemma3_six": _config(
    "gemma3_text",
    "Gemma3ForCausalLM",
    num_hidden_layers=6,
    head_dim=32,
    hidden_activation="gelu_pytorch_tanh",
    sliding_window=8,
    rope_theta=1e6,
    query_pre_attn_scalar=32,
    tie_word_embeddings=True,
  ),
  "phi3": _config(
    "phi3",
    "Phi3ForCausalLM",
    rope_theta=10000.0,
    sliding_window=16,
    original_max_position_embeddings=128,
    pad_token_id=0,
  ),
  "phi4_mini": _config(
    "phi3",
    "Phi3ForCausalLM",
    rope_theta=10000.0,
    sliding_window=None,
    partial_rotary_factor=0.75,
    original_max_position_embeddings=64,
    rope_scaling=dict(
      rope_type="longrope",
      short_factor=[1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
      long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    ),
    tie_word_embeddings=True,
    pad_token_id=0,
  ),
  "olmo2": _config("olmo2", "Olmo2ForCausalLM", rope_theta=10000.0),
  "granite": _config(
    "granite",
    "GraniteForCausalLM",
    rope_theta=10000.0,
    embedding_multiplier=12.0,
    logits_scaling=8.0,
    residual_multiplier=0.22,
    attention_multiplier=0.1,
    tie_word_embeddings=True,
  ),
  "smollm3": _config(
    "smollm3",
    "SmolLM3ForCausalLM",
    rope_theta=10000.0,
    no_rope_layers=[1, 1, 1, 0],
    tie_word_embeddings=True,
    pad_token_id=0,
  ),
}


def token_ids(seed: int = 1) -> np.ndarray:
  return np.random.RandomState(seed).randint(0, 256, TOKENS).astype(np.int32)


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
  """Seeded float32 weights under their Hugging Face names."""
  random = np.random.RandomState(seed)
  d, f = config["hidden_size"], config["intermediate_size"]
  n, k = config["num_attention_heads"], config["num_key_value_heads"]
  h, v = config.get("head_dim", d // n), config["vocab_size"]
  kind = config["model_type"]

  def normal(shape, scale):
    return (scale * random.standard_normal(shape)).astype(np.float32)

  def linear(rows, columns):
    return normal((rows, columns), 1.5 / np.sqrt(columns))

  def norm(size):
    return 1 + normal((size,), 0.2)

  def norms(p, names, size=d):
    for name in names:
      out[f"{p}{name}.weight"] = norm(size) - (kind == "gemma3_text")

  out = {"model.embed_tokens.weight": normal((v, d), 1.0)}
  for i in range(config["num_hidden_layers"]):
    p = f"model.layers.{i}."
    norms(p, _NORMS.get(kind, _NORMS["llama"]))
    for name, rows, columns in (
      ("q", n * h, d),
      ("k", k * h, d),
      ("v", k * h, d),
      ("o", d, n * h),
    ):
      out[f"{p}self_attn.{name}_proj.weight"] = linear(rows, columns)
      biased = config.get("attention_bias") or (kind == "qwen2" and name != "o")
      if biased:
        out[f"{p}self_attn.{name}_proj.bias"] = normal((rows,), 0.5)
      if kind in ("qwen3", "gemma3_text", "olmo2") and name in "qk":
        norms(p, [f"self_attn.{name}_norm"], rows if kind == "olmo2" else h)
    out[p + "mlp.gate_proj.weight"] = linear(f, d)
    out[p + "mlp.up_proj.weight"] = linear(f, d)
    out[p + "mlp.down_proj.weight"] = linear(d, f)
    if kind == "phi3":
      _fuse(out, p + "self_attn.qkv_proj", [
        f"{p}self_attn.{name}_proj" for name in "qkv"])
      _fuse(out, p + "mlp.gate_up_proj", [
        p + "mlp.gate_proj", p + "mlp.up_proj"])
  norms("model.", ["norm"])
  if not config["tie_word_embeddings"]:
    out["lm_head.weight"] = linear(v, d)
  return out


_NORMS = {
  "llama": ("input_layernorm", "post_attention_layernorm"),
  "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
  "gemma3_text": (
    "input_layernorm", "post_attention_layernorm",
    "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


def _fuse(out: dict, name: str, parts: list[str]) -> None:
  """Puts parts below one another, as Phi-3 stores them."""
  out[name + ".weight"] = np.concatenate(
    [out.pop(part + ".weight") for part in parts])


SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|spare|>")
CHATML = (
  "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
  "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
  "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokens() -> list[str]:
  """The 256 byte characters and the specials, in the order of their ids."""
  return sorted(pre_tokenizers.ByteLevel.alphabet()) + list(SPECIALS)


def byte_tokenizer() -> tokenizers.Tokenizer:
  """A tokenizer of single bytes; Qwen2's splitting rules do not show."""
  core = tokenizers.Tokenizer(
    models.BPE(vocab={t: i for i, t in enumerate(byte_tokens())}, merges=[])
  )
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.add_special_tokens(
    [tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIALS]
  )
  return core


def write_tokenizer(folder: pathlib.Path, template: str | None = CHATML):
  byte_tokenizer().save(str(folder / "tokenizer.json"))
  settings = {"eos_token": "<|im_end|>", "chat_template": template}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_folder(
  folder: pathlib.Path, config: dict, tensors: dict, shards: int = 1
) -> pathlib.Path:
  """Writes a Hugging Face folder, its weights in one file or in shards."""
  from safetensors.numpy import save_file

  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  write_tokenizer(folder)
  if shards == 1:
    save_file(tensors, folder / "model.safetensors")
    return folder
  index = {}
  for s in range(shards):
    name = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
    part = {key: tensors[key] for key in list(tensors)[s::shards]}
    save_file(part, folder / name)
    index.update(dict.fromkeys(part, name))
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": index})
  )
  return folder


_GGUF_KINDS = {"gemma3_text": "gemma3"}
_GGUF_NAMES = (
  ("self_attn.qkv_proj", "attn_qkv"),
  ("mlp.gate_up_proj", "ffn_up"),
  ("pre_feedforward_layernorm", "ffn_norm"),
  ("post_feedforward_layernorm", "post_ffw_norm"),
  ("model.embed_tokens", "token_embd"),
  ("model.norm", "output_norm"),
  ("lm_head", "output"),
  ("model.layers", "blk"),
  ("input_layernorm", "attn_norm"),
  ("post_attention_layernorm", "ffn_norm"),
  ("self_attn.q_norm", "attn_q_norm"),
  ("self_attn.k_norm", "attn_k_norm"),
  ("self_attn.q_proj", "attn_q"),
  ("self_attn.k_proj", "attn_k"),
  ("self_attn.v_proj", "attn_v"),
  ("self_attn.o_proj", "attn_output"),
  ("mlp.gate_proj", "ffn_gate"),
  ("mlp.up_proj", "ffn_up"),
  ("mlp.down_proj", "ffn_down"),
)


def _permute(x: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp's reordering of q and k rows (LlamaModel.permute)."""
  return (
    x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    .swapaxes(1, 2)
    .reshape(x.shape)
  )


def write_gguf(
  path: pathlib.Path,
  config: dict,
  tensors: dict,
  quantised: bool = False,
  skip: tuple[str, ...] = (),
  extra: dict | None = None,
  rope_freqs: np.ndarray | None = None,
) -> pathlib.Path:
  """Writes a GGUF file as llama.cpp's converter would."""
  import gguf

  kind = config["model_type"]
  kind = _GGUF_KINDS.get(kind, kind)
  heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
  w = gguf.GGUFWriter(path, kind)
  w.add_block_count(config["num_hidden_layers"])
  w.add_context_length(config["max_position_embeddings"])
  w.add_embedding_length(config["hidden_size"])
  w.add_feed_forward_length(config["intermediate_size"])
  w.add_head_count(heads)
  w.add_head_count_kv(kv)
  w.add_layer_norm_rms_eps(config["rms_norm_eps"])
  if config.get("sliding_window") and kind in ("gemma3", "phi3"):
    w.add_sliding_window(config["sliding_window"])
  rope = config.get("rope_parameters", config)
  scaling = config.get("rope_scaling") or {}
  if scaling.get("rope_type") in ("linear", "yarn"):
    w.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
    w.add_rope_scaling_factor(scaling["factor"])
  if scaling.get("rope_type") in ("longrope", "yarn"):
    w.add_rope_scaling_orig_ctx_len(scaling.get(
      "original_max_position_embeddings",
      config.get("original_max_position_embeddings")))
  if "partial_rotary_factor" in config:
    w.add_rope_dimension_count(
      int(config["hidden_size"] // heads * config["partial_rotary_factor"]))
  if kind == "granite":
    w.add_embedding_scale(config["embedding_multiplier"])
    w.add_residual_scale(config["residual_multiplier"])
    w.add_attention_scale(config["attention_multiplier"])
    w.add_logit_scale(config["logits_scaling"])
  w.add_rope_freq_base(rope["rope_theta"])
  if "head_dim" in config:
    w.add_key_length(config["head_dim"])
    w.add_value_length(config["head_dim"])
  for key, value in (extra or {}).items():
    if isinstance(value, str):
      w.add_string(key, value)
    else:
      w.add_uint32(key, value)
  tokens = byte_tokens()
  w.add_tokenizer_model("gpt2")
  w.add_tokenizer_pre("gpt-2")
  w.add_token_list(tokens)
  w.add_token_types([3 if t in SPECIALS else 1 for t in tokens])
  w.add_eos_token_id(tokens.index("<|im_end|>"))
  w.add_chat_template(CHATML)
  for name, value in tensors.items():
    if kind == "gemma3" and name.endswith("norm.weight"):
      value = value + np.float32(1)
    if kind in ("gemma3", "olmo2"):
      name = name.replace("post_attention_layernorm", "post_attention_norm")
    if kind in ("llama", "smollm3", "granite") and "_proj" in name:
      if "q_proj" in name:
        value = _permute(value, heads)
      elif "k_proj" in name:
        value = _permute(value, kv)
    for old, new in _GGUF_NAMES:
      name = name.replace(old, new)
    if name in skip:
      continue
    if quantised and value.ndim == 2:
      q8 = gguf.GGMLQuantizationType.Q8_0
      w.add_tensor(name, gguf.quants.quantize(value, q8), raw_dtype=q8)
    else:
      w.add_tensor(name, np.ascontiguousarray(value))
  for length in ("long", "short"):
    if f"{length}_factor" in scaling:
      w.add_tensor(f"rope_factors_{length}.weight",
                   np.array(scaling[f"{length}_factor"], np.float32))
  if rope_freqs is not None:
    w.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return path
