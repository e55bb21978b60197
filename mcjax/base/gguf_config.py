"""Reads a decoder's sizes from the metadata and tensors of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mcjax.base import checks, rope
from mcjax.base.config import (
  FAMILIES,
  GEMMA3_LOCAL_INTERVAL,
  GEMMA3_LOCAL_THETA,
  SMOLLM3_NOPE_INTERVAL,
  Folds,
  checked,
  local_layers,
  norm_eps,
  refuse,
  rope_theta,
  traits,
)
from mcjax.base.decoder_config import DecoderConfig, RopeScaling
from mcjax.base.gguf_file import GgufFile
from mcjax.types import McjaxError

# llama.cpp's name of an architecture -> the family.
ARCHITECTURES = {
  "llama": "llama", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3",
  "gemma3": "gemma3_text", "phi3": "phi3", "olmo2": "olmo2",
  "granite": "granite",
}
_GEMMA3_27B_LAYERS = 62  # scales queries by its own head width


class _Fields:
  """The metadata of one architecture."""

  def __init__(self, file: GgufFile):
    arch = file.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
      raise refuse(
        "general.architecture", arch, f"known: {', '.join(ARCHITECTURES)}")
    self._file, self.arch = file, arch
    self.tensors = file.tensors

  def get(self, key: str, default: Any = None) -> Any:
    return self._file.get(f"{self.arch}.{key}", default)

  def size(self, key: str, kind: str, default: int | None = None) -> int:
    value = self.get(key, default)
    if value is None:
      raise McjaxError(f"the GGUF file has no '{self.arch}.{key}'")
    return checks.size(value, f"{self.arch}.{key}", checks.MOST[kind])

  def number(self, key: str, default: float, least: float, most: float):
    return checks.number(
      self.get(key, default), f"{self.arch}.{key}", least, most)


def decoder_config_from_gguf(file: GgufFile) -> DecoderConfig:
  """Builds a DecoderConfig from GGUF metadata and tensor names.

  Args:
    file: an open GGUF file.

  Returns:
    The configuration of the same decoder in `model.py`.

  Raises:
    McjaxError: the architecture is none of `ARCHITECTURES`, a key is missing
      or out of range, or something in the file asks for what the decoder does
      not implement.
  """
  fields = _Fields(file)
  tensors, name = fields.tensors, ARCHITECTURES[fields.arch]
  d_model = fields.size("embedding_length", "d_model")
  n_heads = fields.size("attention.head_count", "n_heads")
  head_dim = fields.size("attention.key_length", "head_dim", d_model // n_heads)
  n_layers = fields.size("block_count", "n_layers")
  max_positions = fields.size("context_length", "max_positions")
  _check_switches(file, fields, head_dim)
  embed = tensors.get("token_embd.weight")
  if embed is None or len(embed.shape) != 2:
    raise McjaxError("the GGUF file has no table 'token_embd.weight'")
  nope = ()
  if name == "smollm3":
    step = SMOLLM3_NOPE_INTERVAL
    nope = tuple(i for i in range(n_layers) if (i + 1) % step == 0)
  eps = "attention.layer_norm_rms_epsilon"
  rest: dict[str, Any] = {
    "max_positions": max_positions,
    **traits(FAMILIES[name]),
    "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
    **_local(fields, name, n_layers, max_positions),
    **_rope(file, fields, name, head_dim, max_positions),
  }
  return checked(DecoderConfig(
    family=name,
    vocab_size=checks.size(
      embed.shape[0], "rows of token_embd", checks.MOST["vocab_size"]),
    d_model=d_model,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=fields.size("attention.head_count_kv", "n_kv_heads", n_heads),
    head_dim=head_dim,
    d_ff=fields.size("feed_forward_length", "d_ff"),
    rms_norm_eps=norm_eps(fields.get(eps), f"{fields.arch}.{eps}"),
    tie_embeddings="output.weight" not in tensors,
    qkv_bias="blk.0.attn_q.bias" in tensors,
    o_bias="blk.0.attn_output.bias" in tensors,
    nope_layers=nope,
    **rest,
  ))


def folds_from_gguf(file: GgufFile) -> Folds:
  """The constants that a GGUF file asks for beyond the decoder's shape.

  llama.cpp's converter has added Gemma's offset to the norms already.

  Raises:
    McjaxError: one is malformed or out of range.
  """
  fields, config = _Fields(file), decoder_config_from_gguf(file)
  if fields.arch == "gemma3":
    query = 1.0
    if config.n_layers == _GEMMA3_27B_LAYERS:
      query = math.sqrt(config.head_dim / (config.d_model / config.n_heads))
    return Folds(embed=math.sqrt(config.d_model), query=query)
  if fields.arch != "granite":
    return Folds()
  root = math.sqrt(config.head_dim)
  return Folds(
    embed=fields.number("embedding_scale", 1.0, 1e-6, 1e6),
    logits=1 / fields.number("logit_scale", 1.0, 1e-6, 1e6),
    residual=fields.number("residual_scale", 1.0, 1e-6, 1e6),
    query=fields.number("attention.scale", 1 / root, 1e-6, 1e6) * root,
  )


def _check_switches(file: GgufFile, fields: _Fields, head_dim: int) -> None:
  """Refuses metadata that changes the forward pass beyond `model.py`."""
  parts = file.get("split.count", 0)
  if parts not in (0, 1):
    raise refuse("split.count", parts, "join it with gguf-split")
  idle: dict[str, tuple] = {
    "attention.value_length": (None, head_dim),
    "expert_count": (None, 0),
    "attention.causal": (None, True),
  }
  if fields.arch != "phi3":
    idle["rope.dimension_count"] = (None, head_dim)
  if fields.arch != "granite":
    idle |= {
      "attention.scale": (None, 1 / math.sqrt(head_dim)),
      "logit_scale": (None, 1.0),
      "embedding_scale": (None, 1.0),
      "residual_scale": (None, 1.0),
    }
  for key in ("final_logit_softcapping", "attn_logit_softcapping"):
    idle[key] = (None, 0.0)
  for key, allowed in idle.items():
    value = fields.get(key)
    if isinstance(value, (list, np.ndarray)) or value not in allowed:
      raise refuse(f"{fields.arch}.{key}", value, "not implemented")


def _local(fields: _Fields, name: str, n_layers: int, max_positions: int
           ) -> dict[str, Any]:
  window = fields.get("attention.sliding_window")
  if not isinstance(window, int | None):
    raise refuse("attention.sliding_window", window, "one number is known")
  key = f"{fields.arch}.attention.sliding_window"
  if name == "gemma3_text":
    step = GEMMA3_LOCAL_INTERVAL
    layers = [i for i in range(n_layers) if (i + 1) % step]
  elif name == "phi3" or not window or window >= max_positions:
    layers = list(range(n_layers))
  else:
    raise refuse(key, window, "not implemented")
  out = local_layers(layers, window or None, key, max_positions)
  if out and name == "gemma3_text":
    theta = fields.get("rope.freq_base_swa", GEMMA3_LOCAL_THETA)
    out["local_rope_theta"] = rope_theta(theta, "rope.freq_base_swa")
  return out


def _rope(file: GgufFile, fields: _Fields, name: str, head_dim: int,
          max_positions: int) -> dict[str, Any]:
  """RoPE's fields of a DecoderConfig."""
  theta = rope_theta(
    fields.get("rope.freq_base", 10000.0), f"{fields.arch}.rope.freq_base")
  out: dict[str, Any] = dict(rope_theta=theta)
  kind = fields.get("rope.scaling.type", "none")
  kind = "default" if kind in ("none", None) else kind
  dims = checks.size(
    fields.get("rope.dimension_count", head_dim),
    f"{fields.arch}.rope.dimension_count", head_dim) // 2 * 2
  legacy = fields.get("rope.scale_linear", 1.0)
  settings = {
    "factor": fields.get("rope.scaling.factor", legacy),
    "original_max_position_embeddings": fields.get(
      "rope.scaling.original_context_length"),
  }
  if kind == "default" and legacy != 1.0:
    kind = "linear"
  short = "rope_factors_short.weight"
  if short in file.tensors:
    kind = "longrope"
    settings["short_factor"] = file.read(short).ravel().tolist()
    settings["factor"] = None
    settings["attention_factor"] = fields.get("rope.scaling.attn_factor")
  if kind not in ("default", "linear", "yarn", "longrope"):
    raise refuse(f"{fields.arch}.rope.scaling.type", kind, "not implemented")
  if kind == "default" and dims == head_dim:
    scaling = _llama3(file, head_dim, theta)
    return out | (dict(rope_scaling=scaling) if scaling else {})
  turn = rope.scaled(kind, settings, theta, dims, max_positions)
  out |= dict(rope_freqs=turn.freqs, rope_magnitude=turn.magnitude)
  original = settings["original_max_position_embeddings"]
  if kind == "longrope" and original is not None:
    out["max_positions"] = min(max_positions, original)
  return out


def _llama3(file: GgufFile, head_dim: int, theta: float) -> RopeScaling | None:
  """Recovers Llama 3's parameters from the divisors in rope_freqs.weight.

  llama.cpp stores only the divisors. All released Llama 3.x models use
  low_freq_factor 1, high_freq_factor 4 and 8192 original positions; the file
  is refused unless exactly these reproduce it.
  """
  name = "rope_freqs.weight"
  if name not in file.tensors:
    return None
  if file.tensors[name].shape != (head_dim // 2,):
    raise refuse(name, file.tensors[name].shape, "one divisor a frequency")
  stored = np.asarray(file.read(name), np.float64)
  s = RopeScaling(float(stored.max()), 1.0, 4.0, 8192)
  if not 1 <= s.factor <= 1e6:
    raise refuse(name, s.factor, "only Llama 3's scaling is implemented")
  freqs = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  turns = s.original_max_positions * freqs / (2 * math.pi)
  span = s.high_freq_factor - s.low_freq_factor
  smooth = np.clip((turns - s.low_freq_factor) / span, 0, 1)
  expected = 1 / ((1 - smooth) / s.factor + smooth)
  if not np.allclose(stored, expected, rtol=1e-4):
    raise refuse(name, "unknown", "only Llama 3's scaling is implemented")
  return None if s.factor == 1 else s
