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

  out = {"model.embed_tokens.weight": normal((v, d), 1.0)}
  for i in range(config["num_hidden_layers"]):
    p = f"model.layers.{i}."
    out[p + "input_layernorm.weight"] = norm(d)
    out[p + "post_attention_layernorm.weight"] = norm(d)
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
      if kind == "qwen3" and name in "qk":
        out[f"{p}self_attn.{name}_norm.weight"] = norm(h)
    out[p + "mlp.gate_proj.weight"] = linear(f, d)
    out[p + "mlp.up_proj.weight"] = linear(f, d)
    out[p + "mlp.down_proj.weight"] = linear(d, f)
  out["model.norm.weight"] = norm(d)
  if not config["tie_word_embeddings"]:
    out["lm_head.weight"] = linear(v, d)
  return out


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


_GGUF_NAMES = (
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
  heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
  w = gguf.GGUFWriter(path, kind)
  w.add_block_count(config["num_hidden_layers"])
  w.add_context_length(config["max_position_embeddings"])
  w.add_embedding_length(config["hidden_size"])
  w.add_feed_forward_length(config["intermediate_size"])
  w.add_head_count(heads)
  w.add_head_count_kv(kv)
  w.add_layer_norm_rms_eps(config["rms_norm_eps"])
  rope = config.get("rope_parameters", config)
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
    if kind in ("llama", "smollm3") and "_proj" in name:
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
  if rope_freqs is not None:
    w.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return path
