"""Reads a decoder's sizes from a Hugging Face `config.json`.

Nine families share the decoder of `model.py`: Llama (and SmolLM2), SmolLM3,
Mistral, Qwen2 (and 2.5), Qwen3, Gemma 3, Phi-3 (and Phi-4-mini), OLMo 2 and
Granite. A setting that the decoder does not implement is refused by name: an
approximated base LM would give wrong numbers without a sign of it.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

from mcjax.base import checks, rope
from mcjax.base.checks import size
from mcjax.base.decoder_config import DecoderConfig, RopeScaling
from mcjax.types import McjaxError

_GELU = ("gelu_pytorch_tanh", "gelu_tanh")
_SILU = ("silu", "swish")


class Family(NamedTuple):
  """What a family does that its `config.json` does not say.

  Attributes:
    architecture: class of its language model in transformers.
    bias: q/k/v always have one.
    reads_bias: `attention_bias` is read.
    qk_norm: queries and keys are normalised, "head" by head or as a "whole".
    tied: embeddings are tied unless told.
    kv_heads: as many as query heads unless told.
    theta: base of RoPE unless told.
    act: activation of the MLP.
    norms: where a block is normalised: "pre", "post" or "both".
    norm_offset: what is added to the norms' stored weights.
  """

  architecture: str
  bias: bool = False
  reads_bias: bool = True
  qk_norm: str = ""
  tied: bool = False
  kv_heads: bool = False
  theta: float | None = None
  act: str = "silu"
  norms: str = "pre"
  norm_offset: float = 0.0


FAMILIES = {
  "llama": Family("LlamaForCausalLM", kv_heads=True, theta=10000.0),
  "smollm3": Family("SmolLM3ForCausalLM", tied=True),
  "mistral": Family("MistralForCausalLM", reads_bias=False),
  "qwen2": Family("Qwen2ForCausalLM", bias=True, reads_bias=False),
  "qwen3": Family("Qwen3ForCausalLM", qk_norm="head"),
  "gemma3_text": Family(
    "Gemma3ForCausalLM", qk_norm="head", tied=True, theta=1e6,
    act="gelu_tanh", norms="both", norm_offset=1.0),
  "phi3": Family(
    "Phi3ForCausalLM", reads_bias=False, kv_heads=True, theta=10000.0),
  "olmo2": Family(
    "Olmo2ForCausalLM", qk_norm="whole", kv_heads=True, norms="post",
    theta=10000.0),
  "granite": Family("GraniteForCausalLM", kv_heads=True, theta=10000.0),
}
_LOCAL = ("gemma3_text", "mistral", "phi3", "qwen2", "qwen3")
# llama.cpp's SmolLM3 leaves every fourth layer without RoPE, whatever the file.
SMOLLM3_NOPE_INTERVAL = 4
GEMMA3_LOCAL_INTERVAL, GEMMA3_LOCAL_THETA = 6, 10000.0


class Folds(NamedTuple):
  """Constants of a family that are worked into its weights on loading.

  So the decoder needs none of them, and vectors of gists stand on the same
  scale as those of tokens.

  Attributes:
    embed: factor on token embeddings.
    logits: factor on logits.
    query: factor on queries, beside 1 / sqrt(head_dim).
    residual: factor on what a block adds.
    norm_offset: added to the norms' weights.
  """

  embed: float = 1.0
  logits: float = 1.0
  query: float = 1.0
  residual: float = 1.0
  norm_offset: float = 0.0


NO_FOLDS = Folds()


def refuse(field: str, value: Any, why: str) -> McjaxError:
  """The error of a setting that the decoder does not implement."""
  told = repr(value)
  told = told if len(told) < 200 else told[:200] + "…"
  return McjaxError(f"unsupported base LM: {field}={told}; {why}")


def _required(hf: Mapping[str, Any], field: str) -> Any:
  if hf.get(field) is None:
    raise McjaxError(f"config.json has no {field!r}")
  return hf[field]


def decoder_config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
  """Builds a DecoderConfig from a parsed `config.json`.

  Args:
    hf: the dict of `config.json`, in the spelling of transformers 4
      (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

  Returns:
    The configuration of the same decoder in `model.py`.

  Raises:
    McjaxError: a field is missing, malformed, out of any sensible range, or
      asks for something that the decoder does not implement.
  """
  name = _family(hf)
  family = FAMILIES[name]

  def count(field: str, key: str) -> int:
    return size(_required(hf, field), field, checks.MOST[key])

  d_model = count("hidden_size", "d_model")
  n_layers = count("num_hidden_layers", "n_layers")
  n_heads = count("num_attention_heads", "n_heads")
  if hf.get("num_key_value_heads") is None and family.kv_heads:
    kv = n_heads
  else:
    kv = count("num_key_value_heads", "n_kv_heads")
  head_dim = hf.get("head_dim")
  if head_dim is None:
    known = {"qwen3": 128, "gemma3_text": 256}
    head_dim = known.get(name, d_model // n_heads)
  head_dim = size(head_dim, "head_dim", checks.MOST["head_dim"])
  max_positions = count("max_position_embeddings", "max_positions")
  _check_hf_switches(hf, family)
  local = _hf_local(hf, name, n_layers, max_positions)
  turn = _hf_rope(hf, name, head_dim, max_positions, local)
  bias = family.reads_bias and bool(hf.get("attention_bias", False))
  tied = hf.get("tie_word_embeddings")
  rest: dict[str, Any] = {
    "max_positions": max_positions, **traits(family), **local, **turn}
  return checked(DecoderConfig(
    family=name,
    vocab_size=count("vocab_size", "vocab_size"),
    d_model=d_model,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=kv,
    head_dim=head_dim,
    d_ff=count("intermediate_size", "d_ff"),
    rms_norm_eps=norm_eps(_required(hf, "rms_norm_eps"), "rms_norm_eps"),
    tie_embeddings=family.tied if tied is None else bool(tied),
    qkv_bias=family.bias or bias,
    o_bias=bias,
    nope_layers=_hf_nope_layers(hf, name, n_layers),
    **rest,
  ))


def traits(family: Family) -> dict[str, Any]:
  """Fields of a DecoderConfig that follow from the family."""
  return dict(
    qk_norm=bool(family.qk_norm), qk_norm_whole=family.qk_norm == "whole",
    act=family.act, pre_norm=family.norms != "post",
    post_norm=family.norms != "pre",
  )


def folds_from_hf(hf: Mapping[str, Any]) -> Folds:
  """The constants that a `config.json` asks for beyond the decoder's shape.

  Raises:
    McjaxError: one is malformed or out of range.
  """
  name, config = _family(hf), decoder_config_from_hf(hf)
  offset = FAMILIES[name].norm_offset
  if name == "gemma3_text":
    scalar = hf.get("query_pre_attn_scalar", 256)
    scalar = checks.number(scalar, "query_pre_attn_scalar", 1e-3, 1e6)
    return Folds(
      embed=math.sqrt(config.d_model), norm_offset=offset,
      query=math.sqrt(config.head_dim / scalar))
  if name != "granite":
    return Folds(norm_offset=offset)

  def factor(field: str) -> float:
    return checks.number(hf.get(field, 1.0), field, 1e-6, 1e6)

  return Folds(
    embed=factor("embedding_multiplier"), logits=1 / factor("logits_scaling"),
    residual=factor("residual_multiplier"),
    query=factor("attention_multiplier") * math.sqrt(config.head_dim))


def norm_eps(value: Any, field: str) -> float:
  """Epsilon of a norm."""
  return checks.number(value, field, 1e-20, 0.1)


def rope_theta(value: Any, field: str) -> float:
  """Base of RoPE."""
  return checks.number(value, field, 1.5, 1e12)


def _family(hf: Mapping[str, Any]) -> str:
  family = hf.get("model_type")
  if not isinstance(family, str) or family not in FAMILIES:
    raise refuse("model_type", family, f"known: {', '.join(FAMILIES)}")
  names = hf.get("architectures") or []
  if names and FAMILIES[family].architecture not in names:
    known = ", ".join(f.architecture for f in FAMILIES.values())
    raise refuse("architectures", names, f"known: {known}")
  return family


def _check_hf_switches(hf: Mapping[str, Any], family: Family) -> None:
  """Refuses switches of the families that `model.py` does not have."""
  name = "hidden_act" if family.act == "silu" else "hidden_activation"
  known = _SILU if family.act == "silu" else _GELU
  act = hf.get(name) or known[0]
  if act not in known:
    raise refuse(name, act, f"only {known[0]} is implemented here")
  if hf.get("quantization_config"):
    method = hf["quantization_config"]
    if isinstance(method, Mapping):
      method = method.get("quant_method", dict(method))
    raise refuse(
      "quantization_config", method, "take the unquantised folder or a GGUF")
  for field in ("mlp_bias", "final_logit_softcapping", "clip_qkv",
                "attn_logit_softcapping", "use_bidirectional_attention"):
    if hf.get(field):
      raise refuse(field, hf[field], "not implemented")


def _hf_local(
  hf: Mapping[str, Any], name: str, n_layers: int, max_positions: int
) -> dict[str, Any]:
  """Layers that read only the newest positions, and how many."""
  types = hf.get("layer_types")
  if types is not None:
    if not isinstance(types, list) or len(types) != n_layers:
      raise McjaxError(f"layer_types must name the {n_layers} layers' kinds")
    for kind in types:
      if kind not in ("full_attention", "sliding_attention"):
        raise refuse("layer_types", kind, "known: full and sliding_attention")
    layers = [i for i, t in enumerate(types) if t == "sliding_attention"]
  elif name == "gemma3_text":
    step = size(
      hf.get("sliding_window_pattern") or GEMMA3_LOCAL_INTERVAL,
      "sliding_window_pattern")
    layers = [i for i in range(n_layers) if (i + 1) % step]
  elif name in ("mistral", "phi3"):
    layers = list(range(n_layers))
  elif hf.get("use_sliding_window"):
    if name not in ("qwen2", "qwen3"):
      raise refuse("use_sliding_window", True, f"in a {name}")
    least = hf.get("max_window_layers", 28)
    if not isinstance(least, int):
      raise McjaxError(f"max_window_layers must be a number, got {least!r}")
    layers = list(range(max(0, least), n_layers))
  else:
    layers = []
  if layers and name not in _LOCAL:
    raise refuse("layer_types", "sliding_attention", f"in a {name}")
  window = hf.get("sliding_window", 4096 if name == "mistral" else None)
  if name.startswith("qwen") and not hf.get("use_sliding_window"):
    window = None
  return local_layers(layers, window, "sliding_window", max_positions)


def local_layers(
  layers: list[int], window: Any, field: str, max_positions: int
) -> dict[str, Any]:
  """Fields of a DecoderConfig; none where the window hides nothing."""
  if not layers or window is None:
    return {}
  window = size(window, field)
  if window >= max_positions:
    return {}
  return dict(local_layers=tuple(layers), local_window=window)


def _hf_nope_layers(
  hf: Mapping[str, Any], family: str, n_layers: int
) -> tuple[int, ...]:
  """Layers without RoPE: entries 0 of `no_rope_layers` (1 means RoPE)."""
  if family != "smollm3":
    if hf.get("no_rope_layers"):
      raise refuse("no_rope_layers", hf["no_rope_layers"], f"in a {family}")
    return ()
  flags = hf.get("no_rope_layers")
  if flags is None:
    step = size(
      hf.get("no_rope_layer_interval", SMOLLM3_NOPE_INTERVAL),
      "no_rope_layer_interval",
    )
    flags = [int((i + 1) % step != 0) for i in range(n_layers)]
  if not isinstance(flags, list) or len(flags) != n_layers:
    count = len(flags) if isinstance(flags, list) else "no"
    raise McjaxError(
      f"no_rope_layers has {count} entries for {n_layers} layers")
  return tuple(i for i, on in enumerate(flags) if not on)


def _hf_rope(
  hf: Mapping[str, Any], name: str, head_dim: int, max_positions: int,
  local: Mapping[str, Any],
) -> dict[str, Any]:
  """RoPE's fields of a DecoderConfig from either generation's spelling."""
  found = {}
  for field in ("rope_scaling", "rope_parameters"):
    value = hf.get(field) or {}
    if not isinstance(value, Mapping):
      raise McjaxError(f"{field} must be an object, got {value!r}")
    found.update(value)
  out = {}
  if any(isinstance(v, Mapping) for v in found.values()):
    if name != "gemma3_text":
      raise refuse("rope_parameters", sorted(found), "one RoPE for all layers")
    near = found.get("sliding_attention") or {}
    local_theta = near.get("rope_theta", GEMMA3_LOCAL_THETA)
    if near.get("rope_type", "default") != "default":
      raise refuse("rope_type", near["rope_type"], "in sliding_attention")
    found = dict(found.get("full_attention") or {})
  else:
    local_theta = hf.get("rope_local_base_freq", GEMMA3_LOCAL_THETA)
  if name == "gemma3_text" and local:
    out["local_rope_theta"] = rope_theta(local_theta, "rope_local_base_freq")
  theta = found.get("rope_theta", hf.get("rope_theta"))
  if theta is None:
    theta = FAMILIES[name].theta
    if theta is None:
      raise McjaxError("config.json has no 'rope_theta'")
  theta = out["rope_theta"] = rope_theta(theta, "rope_theta")
  return out | _hf_scaling(hf, found, name, theta, head_dim, max_positions)


def _hf_scaling(hf, found, name, theta, head_dim, max_positions) -> dict:
  """Fields beside the base: scalings, and a rotation of some channels only."""
  field = "partial_rotary_factor"
  partial = found.get(field, hf.get(field))
  partial = 1.0 if partial is None else partial
  if partial != 1 and name != "phi3":
    raise refuse(field, partial, "only full rotation is implemented")
  dims = int(head_dim * checks.number(partial, field, 0.01, 1.0)) // 2 * 2
  kind = found.get("rope_type", found.get("type", "default"))
  kind = "default" if kind in (None, "none") else kind
  if name == "phi3" and kind in ("su", "yarn"):
    kind = "longrope"  # their old names
  if kind not in rope.KINDS:
    raise refuse("rope_type", kind, f"known: {', '.join(rope.KINDS)}")
  if kind == "default" and dims == head_dim:
    return {}
  if kind == "llama3":
    return dict(rope_scaling=_llama3(found))
  original = "original_max_position_embeddings"
  if found.get(original) is None and hf.get(original) is not None:
    found = {**found, original: hf[original]}
  turn = rope.scaled(kind, found, theta, dims, max_positions)
  out: dict[str, Any] = dict(
    rope_freqs=turn.freqs, rope_magnitude=turn.magnitude)
  if kind == "longrope" and found.get(original) is not None:
    out["max_positions"] = min(max_positions, found[original])
  return out


def _llama3(found: Mapping[str, Any]) -> RopeScaling:
  names = ("factor", "low_freq_factor", "high_freq_factor")
  for name in (*names, "original_max_position_embeddings"):
    if found.get(name) is None:
      raise McjaxError(f"rope_type 'llama3' needs {name!r}")
  scaling = RopeScaling(
    *(checks.number(found[name], name, 0.01, 1e6) for name in names),
    original_max_positions=size(
      found["original_max_position_embeddings"],
      "original_max_position_embeddings",
    ),
  )
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    raise McjaxError("low_freq_factor must be below high_freq_factor")
  return scaling


def checked(config: DecoderConfig) -> DecoderConfig:
  """The configuration, if its sizes go together.

  Raises:
    McjaxError: they do not.
  """
  if config.n_heads % config.n_kv_heads:
    raise McjaxError(
      f"{config.n_heads} query heads cannot share {config.n_kv_heads} key heads"
    )
  if config.head_dim % 2:
    raise McjaxError(f"head_dim must be even for RoPE, got {config.head_dim}")
  return config
