"""Reads a decoder's sizes from a Hugging Face config or GGUF metadata.

Five families share the decoder of `model.py`: Llama (and SmolLM2), SmolLM3,
Mistral, Qwen2 (and 2.5) and Qwen3. A setting that the decoder does not
implement is refused by name: an approximated base LM would give wrong numbers
without a sign of it.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from mcjax.base.model import DecoderConfig, RopeScaling
from mcjax.types import McjaxError

# Family -> whether q/k/v always have a bias, whether `attention_bias` is read,
# whether queries and keys are normalised, and the default of tied embeddings.
_FAMILIES = {
  "llama": dict(bias=False, reads_bias=True, qk_norm=False, tied=False),
  "smollm3": dict(bias=False, reads_bias=True, qk_norm=False, tied=True),
  "mistral": dict(bias=False, reads_bias=False, qk_norm=False, tied=False),
  "qwen2": dict(bias=True, reads_bias=False, qk_norm=False, tied=False),
  "qwen3": dict(bias=False, reads_bias=True, qk_norm=True, tied=False),
}
_ARCHITECTURES = {
  "LlamaForCausalLM": "llama",
  "SmolLM3ForCausalLM": "smollm3",
  "MistralForCausalLM": "mistral",
  "Qwen2ForCausalLM": "qwen2",
  "Qwen3ForCausalLM": "qwen3",
}
# llama.cpp's SmolLM3 leaves every fourth layer without RoPE, whatever the file.
_SMOLLM3_NOPE_INTERVAL = 4


def _refuse(field: str, value: Any, why: str) -> McjaxError:
  return McjaxError(f"unsupported base LM: {field}={value!r}; {why}")


def _required(hf: Mapping[str, Any], field: str) -> Any:
  if hf.get(field) is None:
    raise McjaxError(f"config.json has no {field!r}")
  return hf[field]


def _positive(value: Any, field: str) -> int:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise McjaxError(f"{field} must be a positive integer, got {value!r}")
  return value


def decoder_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
  """Builds a DecoderConfig from a parsed `config.json`.

  Args:
    hf: the dict of `config.json`, in the spelling of transformers 4
      (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

  Returns:
    The configuration of the same decoder in `model.py`.

  Raises:
    McjaxError: a field is missing, malformed or asks for something that the
      decoder does not implement.
  """
  family = _family(hf)
  traits = _FAMILIES[family]
  d_model = _positive(_required(hf, "hidden_size"), "hidden_size")
  n_layers = _positive(_required(hf, "num_hidden_layers"), "num_hidden_layers")
  n_heads = _positive(
    _required(hf, "num_attention_heads"), "num_attention_heads"
  )
  kv = hf.get("num_key_value_heads")
  if kv is None:
    if family != "llama":
      raise McjaxError("config.json has no 'num_key_value_heads'")
    kv = n_heads
  kv = _positive(kv, "num_key_value_heads")
  head_dim = hf.get("head_dim")
  if head_dim is None:
    head_dim = 128 if family == "qwen3" else d_model // n_heads
  max_positions = _positive(
    _required(hf, "max_position_embeddings"), "max_position_embeddings"
  )
  _check_hf_switches(hf, family, max_positions)
  theta, scaling = _hf_rope(hf, family)
  bias = traits["reads_bias"] and bool(hf.get("attention_bias", False))
  tied = hf.get("tie_word_embeddings")
  config = DecoderConfig(
    family=family,
    vocab_size=_positive(_required(hf, "vocab_size"), "vocab_size"),
    d_model=d_model,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=kv,
    head_dim=_positive(head_dim, "head_dim"),
    d_ff=_positive(_required(hf, "intermediate_size"), "intermediate_size"),
    max_positions=max_positions,
    rope_theta=theta,
    rms_norm_eps=_number(_required(hf, "rms_norm_eps"), "rms_norm_eps"),
    tie_embeddings=traits["tied"] if tied is None else bool(tied),
    qkv_bias=traits["bias"] or bias,
    o_bias=bias,
    qk_norm=traits["qk_norm"],
    rope_scaling=scaling,
    nope_layers=_hf_nope_layers(hf, family, n_layers),
  )
  return _checked(config)


def _number(value: Any, field: str) -> float:
  """A float without the noise of a float32 spelling (9.99999974e-06)."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise McjaxError(f"{field} must be a number, got {value!r}")
  return float(str(np.float32(value)))


def _family(hf: Mapping[str, Any]) -> str:
  family = hf.get("model_type")
  if family not in _FAMILIES:
    raise _refuse("model_type", family, f"known: {', '.join(_FAMILIES)}")
  names = hf.get("architectures") or []
  if names and family not in [_ARCHITECTURES.get(n) for n in names]:
    raise _refuse("architectures", names, f"known: {', '.join(_ARCHITECTURES)}")
  return family


def _check_hf_switches(
  hf: Mapping[str, Any], family: str, max_positions: int
) -> None:
  """Refuses switches of the five families that `model.py` does not have."""
  act = hf.get("hidden_act", "silu")
  if act not in ("silu", "swish"):
    raise _refuse("hidden_act", act, "only silu is implemented")
  if hf.get("mlp_bias"):
    raise _refuse("mlp_bias", hf["mlp_bias"], "biased MLPs are not implemented")
  if hf.get("quantization_config"):
    method = hf["quantization_config"]
    if isinstance(method, Mapping):
      method = method.get("quant_method", dict(method))
    raise _refuse(
      "quantization_config", method, "take the unquantised folder or a GGUF"
    )
  types = hf.get("layer_types") or []
  for kind in types:
    if kind != "full_attention":
      raise _refuse("layer_types", kind, "only full_attention is implemented")
  # Mistral uses its window, by default 4096; the others carry an idle one that
  # `use_sliding_window` wakes in the layers that `layer_types` names.
  if family == "mistral":
    used, window = True, hf.get("sliding_window", 4096)
  else:
    used = hf.get("use_sliding_window", False) and not types
    window = hf.get("sliding_window")
  if used and window is not None and window < max_positions:
    raise _refuse(
      "sliding_window", window, "sliding-window attention is not implemented"
    )


def _hf_nope_layers(
  hf: Mapping[str, Any], family: str, n_layers: int
) -> tuple[int, ...]:
  """Layers without RoPE: entries 0 of `no_rope_layers` (1 means RoPE)."""
  if family != "smollm3":
    if hf.get("no_rope_layers"):
      raise _refuse("no_rope_layers", hf["no_rope_layers"], f"in a {family}")
    return ()
  flags = hf.get("no_rope_layers")
  if flags is None:
    step = _positive(
      hf.get("no_rope_layer_interval", _SMOLLM3_NOPE_INTERVAL),
      "no_rope_layer_interval",
    )
    flags = [int((i + 1) % step != 0) for i in range(n_layers)]
  if len(flags) != n_layers:
    raise McjaxError(
      f"no_rope_layers has {len(flags)} entries for {n_layers} layers"
    )
  return tuple(i for i, rope in enumerate(flags) if not rope)


def _hf_rope(
  hf: Mapping[str, Any], family: str
) -> tuple[float, RopeScaling | None]:
  """RoPE base and scaling from either generation's spelling."""
  rope = dict(hf.get("rope_scaling") or {})
  rope.update(hf.get("rope_parameters") or {})
  if any(isinstance(v, Mapping) for v in rope.values()):
    raise _refuse(
      "rope_parameters", sorted(rope), "one RoPE for all layers is implemented"
    )
  theta = rope.get("rope_theta", hf.get("rope_theta"))
  if theta is None:
    if family != "llama":
      raise McjaxError("config.json has no 'rope_theta'")
    theta = 10000.0
  partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
  if partial is not None and partial != 1:
    raise _refuse(
      "partial_rotary_factor", partial, "only full rotation is implemented"
    )
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind in (None, "default", "none"):
    return _number(theta, "rope_theta"), None
  if kind != "llama3":
    raise _refuse("rope_type", kind, "known: default, llama3")
  names = ("factor", "low_freq_factor", "high_freq_factor")
  for name in (*names, "original_max_position_embeddings"):
    if rope.get(name) is None:
      raise McjaxError(f"rope_type 'llama3' needs {name!r}")
  scaling = RopeScaling(
    *(_number(rope[name], name) for name in names),
    original_max_positions=_positive(
      rope["original_max_position_embeddings"],
      "original_max_position_embeddings",
    ),
  )
  return _number(theta, "rope_theta"), scaling


def _checked(config: DecoderConfig) -> DecoderConfig:
  if config.n_heads % config.n_kv_heads:
    raise McjaxError(
      f"{config.n_heads} query heads cannot share {config.n_kv_heads} key heads"
    )
  if config.head_dim % 2:
    raise McjaxError(f"head_dim must be even for RoPE, got {config.head_dim}")
  return config


def decoder_config_from_gguf(reader) -> DecoderConfig:
  """Builds a DecoderConfig from GGUF metadata and tensor names.

  Args:
    reader: an open `gguf.GGUFReader`.

  Returns:
    The configuration of the same decoder in `model.py`.

  Raises:
    McjaxError: the architecture is none of llama (Llama, SmolLM2, Mistral),
      smollm3, qwen2, qwen3, a key is missing, or something in the file asks
      for what the decoder does not implement.
  """
  field = reader.get_field("general.architecture")
  arch = None if field is None else field.contents()
  if arch not in ("llama", "smollm3", "qwen2", "qwen3"):
    raise _refuse(
      "general.architecture", arch, "known: llama, smollm3, qwen2, qwen3"
    )

  def get(key: str, default: Any = None) -> Any:
    found = reader.get_field(f"{arch}.{key}")
    return default if found is None else found.contents()

  def size(key: str, default: Any = None) -> int:
    value = get(key, default)
    if value is None:
      raise McjaxError(f"the GGUF file has no '{arch}.{key}'")
    return _positive(value, f"{arch}.{key}")

  tensors = {t.name: t for t in reader.tensors}
  n_heads, d_model = size("attention.head_count"), size("embedding_length")
  head_dim = size("attention.key_length", d_model // n_heads)
  max_positions = size("context_length")
  n_layers = size("block_count")
  _check_gguf_switches(reader, arch, get, head_dim, max_positions)
  theta = _number(get("rope.freq_base", 10000.0), f"{arch}.rope.freq_base")
  if "token_embd.weight" not in tensors:
    raise McjaxError("the GGUF file has no tensor 'token_embd.weight'")
  nope = ()
  if arch == "smollm3":
    step = _SMOLLM3_NOPE_INTERVAL
    nope = tuple(i for i in range(n_layers) if (i + 1) % step == 0)
  eps = get("attention.layer_norm_rms_epsilon")
  return _checked(
    DecoderConfig(
      family=arch,
      vocab_size=int(tensors["token_embd.weight"].shape[1]),
      d_model=d_model,
      n_layers=n_layers,
      n_heads=n_heads,
      n_kv_heads=size("attention.head_count_kv", n_heads),
      head_dim=head_dim,
      d_ff=size("feed_forward_length"),
      max_positions=max_positions,
      rope_theta=theta,
      rms_norm_eps=_number(eps, f"{arch}.attention.layer_norm_rms_epsilon"),
      tie_embeddings="output.weight" not in tensors,
      qkv_bias="blk.0.attn_q.bias" in tensors,
      o_bias="blk.0.attn_output.bias" in tensors,
      qk_norm="blk.0.attn_q_norm.weight" in tensors,
      rope_scaling=_gguf_rope_scaling(tensors, head_dim, theta),
      nope_layers=nope,
    )
  )


def _check_gguf_switches(reader, arch, get, head_dim, max_positions) -> None:
  """Refuses metadata that changes the forward pass beyond `model.py`."""
  split = reader.get_field("split.count")
  if split is not None and split.contents() > 1:
    raise _refuse("split.count", split.contents(), "join it with gguf-split")
  idle = {
    "attention.value_length": (None, head_dim),
    "rope.dimension_count": (None, head_dim),
    "rope.scaling.type": (None, "none"),
    "rope.scale_linear": (None, 1.0),
    "expert_count": (None, 0),
    "attention.scale": (None, 1 / math.sqrt(head_dim)),
    "logit_scale": (None, 1.0),
    "embedding_scale": (None, 1.0),
    "residual_scale": (None, 1.0),
    "attention.causal": (None, True),
  }
  for key, allowed in idle.items():
    if get(key) not in allowed:
      raise _refuse(f"{arch}.{key}", get(key), "not implemented")
  window = get("attention.sliding_window")
  if window and window < max_positions:
    raise _refuse(f"{arch}.attention.sliding_window", window, "not implemented")


def _gguf_rope_scaling(tensors, head_dim, theta) -> RopeScaling | None:
  """Recovers Llama 3's parameters from the divisors in rope_freqs.weight.

  llama.cpp stores only the divisors. All released Llama 3.x models use
  low_freq_factor 1, high_freq_factor 4 and 8192 original positions; the file
  is refused unless exactly these reproduce it.
  """
  if "rope_freqs.weight" not in tensors:
    return None
  stored = np.asarray(tensors["rope_freqs.weight"].data, np.float64)
  if stored.shape != (head_dim // 2,):
    raise _refuse("rope_freqs.weight", stored.shape, "one divisor a frequency")
  s = RopeScaling(float(stored.max()), 1.0, 4.0, 8192)
  freqs = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  turns = s.original_max_positions * freqs / (2 * math.pi)
  span = s.high_freq_factor - s.low_freq_factor
  smooth = np.clip((turns - s.low_freq_factor) / span, 0, 1)
  expected = 1 / ((1 - smooth) / s.factor + smooth)
  if not np.allclose(stored, expected, rtol=1e-4):
    raise _refuse(
      "rope_freqs.weight", "unknown", "only Llama 3's scaling is implemented"
    )
  return None if s.factor == 1 else s
