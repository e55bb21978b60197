"""GistNet: 32 children (tokens or gists) become one gist, 32→1→32→1.

The children attend to each other, a learned slot reads them (32→1), the
children read the slot back (1→32), and the slot reads the refined children
again (32→1). Every attention is bidirectional. The slot has a few parts of the
network's narrow width, which together make up the base's wide vector.

The output starts as the last-token control, the last child's own vector:
  gist = scale * last child + copies + residual
with a learnable scale that nothing clamps (design 2.6, 2.7). The copies are
full-width mixtures of the children themselves, picked by attention heads, so
that salient tokens reach the base in vectors it knows; the residual is what
the slot writes. Both are zero at initialisation.

`GistNet` is a Flax Linen module used as a pure function of its parameters;
`GistEncoder` binds it to a base model for the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mcjax import pretrained
from mcjax.base import model
from mcjax.types import BRANCHING, McjaxError

BATCH_SIZES = (1, 16, 256)  # padded batches, so that nothing recompiles
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
  """

  d_model: int
  width: int = 192
  heads: int = 6
  mlp_width: int = 216
  slot_parts: int = 4
  copy_heads: int = 8
  slot_mlp_width: int = 384
  slots_per_gist: int = 1
  levels: int = 4
  per_level: bool = False
  input_layer: int = 0
  clamp_norm: bool = False
  input_rms: float = 1.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      lowest = 0 if field.name in ("input_layer", "copy_heads") else 1
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


def _norm(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  scale = module.param(name, nn.initializers.ones, (x.shape[-1],), jnp.float32)
  return model.rms_norm(x, scale, 1e-6)


def _dense(module: nn.Module, name: str, x: jax.Array, size: int,
           zero: bool = False) -> jax.Array:
  init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
  kernel = module.param(name, init, (x.shape[-1], size), jnp.float32)
  return x @ kernel


class Attention(nn.Module):
  """Pre-norm residual attention of x [n, T, w] over y [n, S, w], unmasked."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    width = x.shape[-1]
    q_in = _norm(self, "norm_q", x)
    kv_in = q_in if y is None else _norm(self, "norm_kv", y)

    def split(name, inputs):
      z = _dense(self, name, inputs, width)
      return z.reshape(z.shape[:-1] + (self.heads, width // self.heads))

    q, k, v = split("wq", q_in), split("wk", kv_in), split("wv", kv_in)
    scores = jnp.einsum("nthd,nshd->nhts", q, k) / np.float32(
      np.sqrt(width // self.heads))
    mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores, axis=-1), v)
    return x + _dense(self, "wo", mixed.reshape(x.shape), width)


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
  def __call__(self, children: jax.Array, level: jax.Array) -> jax.Array:
    """Compresses complete blocks.

    Args:
      children: [n, 32, D] float32 vectors in the order of the text.
      level: [] int32, the level of the gists written (1 from tokens).

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
    x = Attention(c.heads, name="children_attention")(x)
    x = FeedForward(c.mlp_width, name="children_mlp")(x)
    slot = self.param("slot", normal, (c.slot_parts, c.width), jnp.float32)
    slot = jnp.broadcast_to(slot[None], (n,) + slot.shape)
    slot = Attention(c.heads, name="down_1")(slot, x)
    slot = FeedForward(c.slot_mlp_width, name="slot_mlp_1")(slot)
    x = Attention(c.heads, name="up")(x, slot)
    slot = Attention(c.heads, name="down_2")(slot, x)
    slot = FeedForward(c.slot_mlp_width, name="slot_mlp_2")(slot)
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
      gists = model.rms_norm(
        gists, jnp.full((c.d_model,), c.input_rms, jnp.float32), 1e-6)
    return gists

  def _copies(self, x: jax.Array, children: jax.Array) -> jax.Array:
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


def init_params(config: GistNetConfig, seed: int = 0):
  """Fresh parameters; a leading [levels] axis on each if `per_level`."""
  params = GistNet(config).init(
    jax.random.key(seed),
    jnp.zeros((1, BRANCHING, config.d_model), jnp.float32), jnp.int32(1),
  )["params"]
  if config.per_level:
    params = jax.tree.map(lambda a: jnp.stack([a] * config.levels), params)
  return params


def apply(params, config: GistNetConfig, children: jax.Array,
          level: jax.Array | int = 1) -> jax.Array:
  """Gists [n, m, D] float32 of children [n, 32, D]; `level` is the gists'."""
  level = jnp.asarray(level, jnp.int32)
  if config.per_level:
    own = jnp.clip(level - 1, 0, config.levels - 1)
    params = jax.tree.map(lambda a: a[own], params)
  return GistNet(config).apply(
    {"params": params}, children.astype(jnp.float32), level)


def token_features(base_params, base_config: model.DecoderConfig,
                   token_ids: jax.Array, input_layer: int = 0) -> jax.Array:
  """What GistNet reads of blocks of ids [n, 32]: [n, 32, D] float32."""
  x = model.embed(base_params, token_ids)
  if input_layer:
    if input_layer > base_config.n_layers:
      raise McjaxError(f"GistNetConfig.input_layer={input_layer} is more than "
                       f"the base's {base_config.n_layers} layers")
    first = jax.tree.map(lambda a: a[:input_layer], base_params["layers"])
    config = dataclasses.replace(base_config, n_layers=input_layer)
    positions = jnp.arange(BRANCHING, dtype=jnp.int32)
    x = jax.vmap(lambda block: model.forward(
      base_params | {"layers": first}, config, block, positions)[0])(x)
  return x.astype(jnp.float32)


def default_config(base_params, base_config: model.DecoderConfig,
                   **overrides) -> GistNetConfig:
  """The default sizes for a base, in the unit of its embeddings."""
  d = base_config.d_model
  heads = max(1, round(d / 96))
  sizes = dict(d_model=d, heads=heads, width=32 * heads, mlp_width=36 * heads,
               slot_mlp_width=64 * heads)
  sample = jnp.asarray(base_params["embed"][:4096]).astype(jnp.float32)
  rms = float(jnp.sqrt(jnp.mean(jnp.square(sample))))
  return GistNetConfig(**{**sizes, "input_rms": rms, **overrides})


def configure(base_params, base_config: model.DecoderConfig,
              values: Mapping[str, Any]) -> GistNetConfig:
  """`default_config` with plain values of a configuration file.

  Raises:
    McjaxError: names an unknown field or an invalid value.
  """
  known = [field.name for field in dataclasses.fields(GistNetConfig)]
  unknown = sorted(set(values) - set(known))
  if unknown:
    raise McjaxError(f"config.gistnet.{unknown[0]} is not a setting; known are "
                     + ", ".join(known))
  return default_config(base_params, base_config, **values)


def flops_per_token(config: GistNetConfig,
                    base_config: model.DecoderConfig | None = None) -> int:
  """Multiply-adds x 2 of GistNet per input token (child); tables are free.

  With `base_config`, the base's layers under `input_layer` are counted in.
  """
  w, c, p = config.width, BRANCHING, config.slot_parts
  copies = config.copy_heads * config.slots_per_gist
  children = c * (config.d_model * w        # w_in
                  + 4 * w * w + 2 * c * w   # self-attention
                  + 2 * w * config.mlp_width
                  + 6 * w * w               # down_1, down_2: k, v; up: q, o
                  + copies * (w + config.d_model))
  slot = p * (2 * (2 * w * w + 2 * w * config.slot_mlp_width)  # q, o, mlp
              + 2 * w * w                                      # up: k, v
              + 6 * c * w)                                     # scores, mixes
  out = (p * w * config.slots_per_gist + copies) * config.d_model
  total = 2 * (children + slot + out) // c
  if base_config is not None and config.input_layer:
    head = 2 * base_config.d_model * base_config.vocab_size
    layer = (base_config.flops_per_token - head) // base_config.n_layers
    total += config.input_layer * layer
  return total


def params_per_layer(params) -> dict[str, int]:
  """Parameters of every stage of the network, by the stage's name."""
  return {name: sum(int(np.prod(a.shape)) for a in jax.tree.leaves(stage))
          for name, stage in params.items()}


def save_gistnet(path, params, config: GistNetConfig, card: dict) -> None:
  """Writes weights, configuration and the facts of `card` as safetensors."""
  pretrained.save_weights(
    path, "gistnet", params, dataclasses.asdict(config), card)


def read_gistnet(path) -> tuple[dict, GistNetConfig, dict]:
  """Reads (params, config, card) that `save_gistnet` wrote.

  Raises:
    McjaxError: no such file, not a GistNet, of another version, or weights
      that do not fit the stored configuration.
  """
  params, fields, card = pretrained.read_weights(path, "gistnet")
  try:
    config = GistNetConfig(**fields)
  except TypeError as error:
    raise McjaxError(f"{path}: unknown configuration, {error}") from error
  expected = jax.eval_shape(lambda: init_params(config))
  shapes = [jax.tree.map(lambda a: a.shape, p) for p in (params, expected)]
  if shapes[0] != shapes[1]:
    raise McjaxError(f"{path}: weights do not fit the stored configuration")
  return params, config, card


@functools.partial(jax.jit, static_argnames=("config", "base_config"))
def _encode_ids(params, base_params, token_ids, config, base_config):
  features = token_features(
    base_params, base_config, token_ids, config.input_layer)
  return apply(params, config, features, 1)


_encode_children = jax.jit(apply, static_argnames="config")


class GistEncoder:
  """A GistNet bound to a base model: token ids or gists in, gists out.

  Attributes:
    fingerprint: identifies weights and configuration.
    d_model: width of a gist.
    slots_per_gist: vectors per gist.
    trained: False for the untrained start (the last-token control).
    config: the network's `GistNetConfig`.
    params: its parameters.
    card: facts recorded with the weights.
  """

  def __init__(self, lm, params, config: GistNetConfig, trained: bool,
               card: dict | None = None):
    if config.d_model != lm.config.d_model:
      raise McjaxError(f"this GistNet writes vectors of {config.d_model}, but "
                       f"{lm.name} embeds in {lm.config.d_model}")
    self.fingerprint = pretrained.fingerprint(
      params, dataclasses.asdict(config))
    self.d_model = config.d_model
    self.slots_per_gist = config.slots_per_gist
    self.trained = trained
    self.config = config
    self.params = params
    self.card = card or {}
    self._vocab_size = lm.config.vocab_size
    self._base_config = lm.config
    self._base = {"embed": lm.params["embed"]}
    if config.input_layer:
      self._base |= {k: lm.params[k] for k in ("layers", "final_norm")}

  def _in_batches(self, inputs: np.ndarray, run) -> np.ndarray:
    """Applies `run` to padded batches of fixed sizes; drops the padding."""
    out = np.empty(
      (len(inputs), self.slots_per_gist, self.d_model), np.float32)
    start = 0
    while start < len(inputs):
      left = len(inputs) - start
      size = next((s for s in BATCH_SIZES if s >= left), BATCH_SIZES[-1])
      take = min(size, left)
      batch = np.zeros((size,) + inputs.shape[1:], inputs.dtype)
      batch[:take] = inputs[start : start + take]
      out[start : start + take] = np.asarray(run(batch))[:take]
      start += take
    return out

  def encode(self, token_ids) -> np.ndarray:
    """Gists [N, m, D] float32 of complete blocks of token ids [N, 32].

    Raises:
      McjaxError: blocks that are not 32 long, or ids outside the vocabulary.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 2 or ids.shape[1] != BRANCHING:
      raise McjaxError(f"token ids must be [N, {BRANCHING}] complete blocks, "
                       f"got {list(ids.shape)}")
    if ids.size and not (0 <= ids.min() and ids.max() < self._vocab_size):
      raise McjaxError("token ids must lie in the base's vocabulary of "
                       f"{self._vocab_size}")
    return self._in_batches(
      ids.astype(np.int32),
      lambda batch: _encode_ids(
        self.params, self._base, batch, config=self.config,
        base_config=self._base_config))

  def encode_tokens(self, token_ids) -> np.ndarray:
    """L1 gists [n, D] float32 of ids [n, 32]; one vector per gist."""
    return self._single(self.encode(token_ids))

  def encode_gists(self, gists, level: int) -> np.ndarray:
    """Parents [n, D] float32 of gists [n, 32, D]; `level` is the parents'.

    Raises:
      McjaxError: incomplete sets of children, another width, or level < 2.
    """
    children = np.asarray(gists, np.float32)
    if children.ndim != 3 or children.shape[1:] != (BRANCHING, self.d_model):
      raise McjaxError(f"gists must be [n, {BRANCHING}, {self.d_model}], got "
                       f"{list(children.shape)}")
    if level < 2:
      raise McjaxError(f"a gist of gists has level ≥ 2, got {level}")
    return self._single(self._in_batches(
      children,
      lambda batch: _encode_children(
        self.params, self.config, batch, jnp.int32(level))))

  def _single(self, gists: np.ndarray) -> np.ndarray:
    if self.slots_per_gist != 1:
      raise McjaxError(f"this GistNet writes {self.slots_per_gist} vectors per "
                       "gist; the runtime holds one")
    return gists[:, 0]


def load_gistnet(lm, source=None) -> GistEncoder:
  """The GistNet of a base: the given weights, else the shipped, else fresh.

  Args:
    lm: a loaded base (`mcjax.load_base_lm`).
    source: path of a `gistnet.safetensors`; None takes the weights shipped for
      a base of this name, or else an untrained, deterministic network that
      equals the last-token control (`trained` is False).

  Raises:
    McjaxError: `source` is missing, unreadable or made for another width.
  """
  if source is not None:
    params, config, card = read_gistnet(source)
    return GistEncoder(lm, params, config, trained=True, card=card)
  shipped = pretrained.shipped(lm.name, "gistnet")
  if shipped is not None:
    params, config, card = read_gistnet(shipped)
    if config.d_model == lm.config.d_model:
      return GistEncoder(lm, params, config, trained=True, card=card)
  config = default_config(lm.params, lm.config)
  return GistEncoder(lm, init_params(config), config, trained=False)
