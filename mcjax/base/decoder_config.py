"""Sizes and switches of the frozen decoder."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1 frequency scaling (`rope_type: llama3`)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and switches of a Llama-family decoder; hashable, a jit static."""

  family: str
  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  max_positions: int
  rope_theta: float
  rms_norm_eps: float
  tie_embeddings: bool
  qkv_bias: bool = False
  o_bias: bool = False
  qk_norm: bool = False
  rope_scaling: RopeScaling | None = None
  nope_layers: tuple[int, ...] = ()  # layers without RoPE (SmolLM3)
  # Fields from here on came later; at their defaults no fingerprint has them.
  rope_freqs: tuple[float, ...] | None = None  # in place of rope_theta's
  rope_magnitude: float = 1.0  # of cosines and sines
  local_layers: tuple[int, ...] = ()  # that read the newest positions only
  local_window: int = 0  # positions that a local layer reads, its own included
  local_rope_theta: float | None = None  # of local layers, if another
  qk_norm_whole: bool = False  # one norm over all heads (OLMo 2)
  pre_norm: bool = True  # a block's input is normalised
  post_norm: bool = False  # a block's output is (Gemma 3, OLMo 2)
  act: str = "silu"  # or gelu_tanh
  attention: str = "plain"  # how it is computed, see fused_attention

  @property
  def flops_per_token(self) -> int:
    """Multiply-adds x 2 of one token's forward, attention scores excluded."""
    attention = self.d_model * self.head_dim * (
      2 * self.n_heads + 2 * self.n_kv_heads
    )
    layer = attention + 3 * self.d_model * self.d_ff
    return 2 * (self.n_layers * layer + self.d_model * self.vocab_size)
