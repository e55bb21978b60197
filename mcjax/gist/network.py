"""The GistNet network: 32 children (tokens or gists) become one gist.

32→1→32→1: the children attend to each other, a learned slot reads them (32→1),
the children read the slot back (1→32), and the slot reads the refined children
again (32→1). Every attention is bidirectional. The slot has a few parts of the
network's narrow width, which together make up the base's wide vector.

The output starts as the last-token control, the last child's own vector:
  gist = scale * last child + copies + residual
with a learnable scale that nothing clamps: optimal soft tokens are up to a
hundred times as long as a token's embedding. The copies are
full-width mixtures of the children themselves, picked by attention heads, so
that salient tokens reach the base in vectors it knows; the residual is what
the slot writes. Both are zero at initialisation.

With `context_blocks` a slot also reads, before its last look at the children,
the slots of the blocks before its own: what they have said it need not repeat.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from mcjax.base import decoder_layer
from mcjax.types import BRANCHING, Array, McjaxError

_COPY_UNIT = 8.0  # gains move as fast as the residual under one learning rate


@dataclasses.dataclass(frozen=True)
class GistNetConfig:
  """Sizes and switches of a GistNet; hashable, a jit static.

  Attributes:
    d_model: width of the base's embeddings, and of a gist.
    width: inner width of the network.
    heads: attention heads; divides `width`.
    mlp_width: hidden width of the children's feed-forward.
    slot_parts: vectors of `width` that form the slot.
    slot_mlp_width: hidden width of the slot's feed-forward.
    copy_heads: heads that mix whole children into the gist; 0 leaves it out.
    children_layers: layers of attention and feed-forward of the children
      among themselves, before the slot reads them.
    rounds: times that the children are read and written back (32→1→32) before
      the last reading.
    context_blocks: blocks before its own whose slots an L1 gist reads; 0
      leaves it out. Training and evaluation only: the runtime has 0.
    slots_per_gist: vectors per gist (m); the runtime uses 1.
    levels: level embeddings, or weight sets if `per_level`; higher levels
      share the last.
    per_level: own weights for every level instead of shared ones.
    input_layer: 0 reads token embeddings; k reads the base's hidden states
      after its first k layers, run over the block alone. Ablation only: it
      costs k of the base's layers per token.
    clamp_norm: rescale every gist to `input_rms`. Ablation only.
    input_rms: root mean square of the base's embeddings, the unit in which the
      residual branch writes.
    adapter_layers: layers of the base that read gists through an adapter (a
      gain and a shift of every channel of the layer's input, for gists alone,
      see `model.forward`); 0 leaves it out.
    adapter_rank: rank of the map that the adapter adds in every layer; 0
      leaves gain and shift alone.
    lora_rank: rank of low-rank maps beside the base's attention projections,
      see `lora.py`; 0 leaves them out.
    lora_scope: "gists", rows at which they act, or "all".
    key_value: a small network writes every gist's keys and values from those
      of its tokens, see `key_value.py`.
    base_shape: (query heads, key heads, channels a head) of the base, where
      `lora_rank` or `key_value` asks for it.
  """

  d_model: int
  width: int = 192
  heads: int = 6
  mlp_width: int = 216
  slot_parts: int = 4
  copy_heads: int = 8
  slot_mlp_width: int = 384
  children_layers: int = 1
  rounds: int = 1
  context_blocks: int = 0
  slots_per_gist: int = 1
  levels: int = 4
  per_level: bool = False
  input_layer: int = 0
  clamp_norm: bool = False
  input_rms: float = 1.0
  adapter_layers: int = 0
  adapter_rank: int = 0
  lora_rank: int = 0
  lora_scope: str = "gists"
  key_value: bool = False
  base_shape: tuple[int, ...] = ()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      optional = ("input_layer", "copy_heads", "adapter_layers",
                  "adapter_rank", "lora_rank", "context_blocks")
      lowest = 0 if field.name in optional else 1
      if field.type == "int" and value < lowest:
        raise McjaxError(f"GistNetConfig.{field.name} must be ≥ {lowest}, "
                         f"got {value}")
    if self.width % self.heads:
      raise McjaxError(f"GistNetConfig.heads={self.heads} does not divide "
                       f"width={self.width}")
    if BRANCHING % self.slots_per_gist:
      raise McjaxError(f"GistNetConfig.slots_per_gist={self.slots_per_gist} "
                       f"does not divide {BRANCHING}")
    if not self.input_rms > 0:
      raise McjaxError("GistNetConfig.input_rms must be positive")
    object.__setattr__(self, "base_shape", tuple(self.base_shape))
    if self.lora_scope not in ("gists", "all"):
      raise McjaxError("GistNetConfig.lora_scope must be gists or all, got "
                       f"{self.lora_scope!r}")
    if (self.lora_rank or self.key_value) and not (
        self.adapter_layers and len(self.base_shape) == 3):
      raise McjaxError("GistNetConfig.lora_rank and key_value need "
                       "adapter_layers and base_shape")


def _norm(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  scale = module.param(name, nn.initializers.ones, (x.shape[-1],), jnp.float32)
  return decoder_layer.rms_norm(x, scale, 1e-6)


def _kernel(module: nn.Module, name: str, inputs: int, outputs: int,
            zero: bool = False) -> jax.Array:
  init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
  return module.param(name, init, (inputs, outputs), jnp.float32)


def _dense(module: nn.Module, name: str, x: jax.Array, size: int,
           zero: bool = False) -> jax.Array:
  return x @ _kernel(module, name, x.shape[-1], size, zero)


class Attention(nn.Module):
  """Pre-norm residual attention of x [n, T, w] over y [n, S, w], unmasked.

  Between the children and the few parts of the slot only the slot is
  projected: q (y Wk)' is (q Wk') y', and the weights of the values move the
  same way. That is a quarter of the work, and the same function.
  """

  heads: int
  silent: bool = False  # adds nothing before it is trained

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    width = x.shape[-1]
    size = width // self.heads
    x_in = _norm(self, "norm_q", x)
    y_in = x_in if y is None else _norm(self, "norm_kv", y)
    wq, wk, wv = (
      _kernel(self, name, width, width).reshape(width, self.heads, size)
      for name in ("wq", "wk", "wv"))
    wo = _kernel(self, "wo", width, width, self.silent)
    out = wo.reshape(self.heads, size, width)
    scale = np.float32(np.sqrt(size))
    if y is None:
      q, k, v = (jnp.einsum("ntw,whd->nthd", x_in, z) for z in (wq, wk, wv))
      scores = jnp.einsum("nthd,nshd->nhts", q, k) / scale
      mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v)
      return x + mixed.reshape(x.shape) @ wo
    if x.shape[1] < y.shape[1]:  # the slot reads the children
      q = jnp.einsum("ntw,whd->nthd", x_in, wq) / scale
      probe = jnp.einsum("nthd,whd->nthw", q, wk)
      scores = jnp.einsum("nthw,nsw->nths", probe, y_in)
      mixed = jnp.einsum("nths,nsw->nthw", jax.nn.softmax(scores), y_in)
      mixed = jnp.einsum("nthw,whd->nthd", mixed, wv)
      return x + mixed.reshape(x.shape) @ wo
    k, v = (jnp.einsum("nsw,whd->nshd", y_in, z) for z in (wk, wv))
    probe = jnp.einsum("nshd,whd->nhsw", k / scale, wq)
    values = jnp.einsum("nshd,hdw->nhsw", v, out)
    scores = jnp.einsum("ntw,nhsw->nths", x_in, probe)
    return x + jnp.einsum("nths,nhsw->ntw", jax.nn.softmax(scores), values)


class FeedForward(nn.Module):
  """Pre-norm residual two-layer feed-forward on x [n, T, w]."""

  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = _dense(self, "w_up", _norm(self, "norm", x), self.hidden)
    return x + _dense(self, "w_down", jax.nn.gelu(y), x.shape[-1])


class GistNet(nn.Module):
  """The 32→1→32→1 refinement; children [n, 32, D] → gists [n, m, D]."""

  config: GistNetConfig

  @nn.compact
  def __call__(self, children: Float[jax.Array, "n 32 D"],
               level: Int[Array, ""], run: int | None = None
               ) -> Float[jax.Array, "n M D"]:
    """Compresses complete blocks.

    Args:
      children: [n, 32, D] float32 vectors in the order of the text.
      level: [] int32, the level of the gists written (1 from tokens).
      run: so many blocks in a row are of one text, for `context_blocks`; all
        if None.

    Returns:
      [n, m, D] float32 gists in the base's embedding space.
    """
    c = self.config
    n = children.shape[0]
    normal = nn.initializers.normal(0.5)
    x = _dense(self, "w_in", _norm(self, "norm_in", children), c.width)
    place = self.param("position", normal, (BRANCHING, c.width), jnp.float32)
    tiers = self.param(
      "level", nn.initializers.zeros, (c.levels, c.width), jnp.float32)
    tier = tiers[jnp.clip(level - 1, 0, c.levels - 1)]
    x = x + (place + tier[None])[None]
    for number in range(1, c.children_layers + 1):
      end = "" if number == 1 else f"_{number}"
      x = Attention(c.heads, name=f"children_attention{end}")(x)
      x = FeedForward(c.mlp_width, name=f"children_mlp{end}")(x)
    slot = self.param("slot", normal, (c.slot_parts, c.width), jnp.float32)
    slot = jnp.broadcast_to(slot[None], (n,) + slot.shape)
    for number in range(1, c.rounds + 2):
      if c.context_blocks and number == c.rounds + 1:
        before = self._before(slot, level, run or n)
        slot = Attention(c.heads, silent=True, name="context")(slot, before)
      slot = Attention(c.heads, name=f"down_{number}")(slot, x)
      slot = FeedForward(c.slot_mlp_width, name=f"slot_mlp_{number}")(slot)
      if number <= c.rounds:
        up = "up" if number == 1 else f"up_{number}"
        x = Attention(c.heads, name=up)(x, slot)
    flat = _norm(self, "norm_out", slot).reshape(n, c.slot_parts * c.width)
    m = c.slots_per_gist
    residual = _dense(self, "w_out", flat, m * c.d_model, zero=True)
    scale = self.param("scale", nn.initializers.ones, (m,), jnp.float32)
    control = children[:, BRANCHING // m - 1 :: BRANCHING // m]
    gists = (control * scale[None, :, None]
             + residual.reshape(n, m, c.d_model) * np.float32(c.input_rms))
    if c.copy_heads:
      gists = gists + self._copies(x, children)
    if c.clamp_norm:
      gists = decoder_layer.rms_norm(
        gists, jnp.full((c.d_model,), c.input_rms, jnp.float32), 1e-6)
    return gists

  def _before(self, slot: Float[jax.Array, "n P w"], level: Int[Array, ""],
              run: int) -> Float[jax.Array, "n KP w"]:
    """The slots of the blocks before each, [n, k * parts, w], nearest first.

    Zeros stand where the text has no such block, and at higher levels.
    """
    k = self.config.context_blocks
    n, parts, width = slot.shape
    texts = slot.reshape(n // run, run, parts, width)
    texts = jnp.where(level == 1, texts, jnp.zeros_like(texts))
    padded = jnp.pad(texts, ((0, 0), (k, 0), (0, 0), (0, 0)))
    before = jnp.stack(
      [padded[:, k - j : k - j + run] for j in range(1, k + 1)], axis=2)
    place = self.param(
      "context_place", nn.initializers.normal(0.5), (k, 1, width), jnp.float32)
    return (before + place[None, None]).reshape(n, k * parts, width)

  def _copies(self, x: Float[jax.Array, "n 32 w"],
              children: Float[Array, "n 32 D"]
              ) -> Float[jax.Array, "n M D"]:
    """Mixtures [n, m, D] of children [n, 32, D] by their states x."""
    c = self.config
    m, heads = c.slots_per_gist, c.copy_heads
    picks = _dense(self, "copy_picks", _norm(self, "norm_copy", x), m * heads)
    picks = picks.reshape(x.shape[:2] + (m, heads))
    gain = self.param(
      "copy_gain", nn.initializers.zeros, (m, heads, c.d_model), jnp.float32)
    mixed = jnp.einsum(
      "nsmh,nsd->nmhd", jax.nn.softmax(picks, axis=1), children)
    return jnp.einsum("nmhd,mhd->nmd", mixed, gain * np.float32(_COPY_UNIT))
