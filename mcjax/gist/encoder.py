"""GistNet as the runtime and the trainer use it: gists, and what they cost.

`network.py` is the network, a Flax Linen module used as a pure function
of its parameters. `GistEncoder` binds it to a base model. Beside the network's
stages the parameters may hold an "adapter", which does not write gists: the
base reads them through it (`with_adapter`).
"""

from __future__ import annotations

from concurrent import futures
import dataclasses
import os
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from mcjax.base import model
from mcjax.base.load import BaseLM
from mcjax.gist import adapters
from mcjax.gist import lora as low_rank
from mcjax.gist import weights as gist_weights
from mcjax.gist.network import GistNet, GistNetConfig
from mcjax.types import BRANCHING, Array, McjaxError

# Padded batches, so that nothing recompiles; 64 blocks fit a CPU core's cache.
BATCH_SIZES = (1, 64)
# XLA's CPU backend runs these small products on one core, a batch each.
_THREADS = min(8, os.cpu_count() or 1)


def apply(params, config: GistNetConfig, children: Float[Array, "n 32 D"],
          level: Int[Array, ""] | int = 1, run: int | None = None
          ) -> Float[jax.Array, "n M D"]:
  """Gists [n, m, D] float32 of children [n, 32, D]; see `GistNet`."""
  level = jnp.asarray(level, jnp.int32)
  params = adapters.without_adapter(params)
  if config.per_level:
    own = jnp.clip(level - 1, 0, config.levels - 1)
    params = jax.tree.map(lambda a: a[own], params)
  gists = GistNet(config).apply(
    {"params": params}, children.astype(jnp.float32), level, run)
  return cast(jax.Array, gists)


def token_features(base_params, base_config: model.DecoderConfig,
                   token_ids: Int[Array, "n 32"], input_layer: int = 0
                   ) -> Float[jax.Array, "n 32 D"]:
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


def flops_per_token(config: GistNetConfig,
                    base_config: model.DecoderConfig | None = None) -> int:
  """Multiply-adds x 2 of GistNet per input token (child); tables are free.

  The adapter's are counted, once a gist. With `base_config`, the base's layers
  under `input_layer` are counted in.
  """
  w, c, p = config.width, BRANCHING, config.slot_parts
  r = config.rounds
  copies = config.copy_heads * config.slots_per_gist
  children = c * (config.d_model * w        # w_in
                  + config.children_layers * (
                    4 * w * w + 2 * c * w   # self-attention
                    + 2 * w * config.mlp_width)
                  + copies * (w + config.d_model))
  slot = p * ((r + 1) * 2 * w * config.slot_mlp_width
              + (2 * r + 1) * (4 * w * w  # of every down and up
                               + 2 * config.heads * c * w))  # scores, mixes
  out = (p * w * config.slots_per_gist + copies) * config.d_model
  adapter = (config.adapter_layers * config.slots_per_gist
             * config.d_model * (1 + 2 * config.adapter_rank))
  if config.lora_rank and config.lora_scope == "gists":
    adapter += low_rank.weights_per_layer(
      config.d_model, config.base_shape, config.lora_rank
    ) * config.adapter_layers * config.slots_per_gist
  total = 2 * (children + slot + out + adapter) // c
  if config.context_blocks:  # 4 projections of the slot, scores and mixes
    total += 2 * p * w * (4 * w + 2 * config.heads * config.context_blocks * p
                          ) // c
  if base_config is not None and config.input_layer:
    head = 2 * base_config.d_model * base_config.vocab_size
    layer = (base_config.flops_per_token - head) // base_config.n_layers
    total += config.input_layer * layer
  return total


def params_per_layer(params) -> dict[str, int]:
  """Parameters of every stage of the network, by the stage's name.

  The adapter has a layer for each of the base's; "adapter" is one of them.
  """
  sizes = {name: sum(int(np.prod(a.shape)) for a in jax.tree.leaves(stage))
           for name, stage in params.items()}
  if "adapter" in params:
    sizes["adapter"] //= len(params["adapter"]["gain"])
  return sizes


# Two programs, so that tokens and gists share the large one.
_read_tokens = jax.jit(
  token_features, static_argnames=("base_config", "input_layer"))
_encode = jax.jit(apply, static_argnames=("config", "run"))


class GistEncoder:
  """A GistNet bound to a base model: token ids or gists in, gists out.

  Attributes:
    fingerprint: see `weights.fingerprint`.
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
    if config.adapter_layers not in (0, lm.config.n_layers):
      raise McjaxError(f"this GistNet adapts {config.adapter_layers} layers, "
                       f"but {lm.name} has {lm.config.n_layers}")
    self.fingerprint = gist_weights.fingerprint(params, config)
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

  def bound_to(self, lm: BaseLM) -> GistEncoder:
    """The same GistNet, reading the embeddings of this copy of its base."""
    if lm.params["embed"] is self._base["embed"]:
      return self
    return GistEncoder(lm, self.params, self.config, self.trained, self.card)

  def gists_seen(self, window: int) -> int | None:
    """The newest gists, so many, that the LM should attend to; None for all.

    By the card: "gist_attention" masked is 0, and "gists_seen" maps windows, as
    strings, to the number that holds up to this window; above them it is 0.
    The untrained start is not attended to.
    """
    table = self.card.get("gists_seen")
    if not self.trained or self.card.get("gist_attention") == "masked":
      return 0
    if table is None:
      return None
    fitting = [int(w) for w in table if int(w) >= window]
    return int(table[str(min(fitting))]) if fitting else 0

  def reader(self, lm: BaseLM) -> BaseLM:
    """The base as it reads this GistNet's gists: with the adapter, if any."""
    if not self.config.adapter_layers:
      return lm
    return dataclasses.replace(
      lm, params=adapters.with_adapter(lm.params, self.params))

  def with_lora(self, lm: BaseLM, folder) -> GistEncoder:
    """This GistNet, with the maps of a PEFT folder in its adapter.

    Raises:
      McjaxError: as `lora.load`; or this GistNet has no adapter.
    """
    scope, maps = low_rank.load(folder, lm.config)
    config = dataclasses.replace(
      self.config, lora_rank=maps["q"]["a"].shape[-1], lora_scope=scope,
      base_shape=low_rank.shape_of(lm.config))
    adapter = {name: a for name, a in self.params["adapter"].items()
               if name not in low_rank.SCOPES.values()}
    params = {**self.params,
              "adapter": {**adapter, low_rank.SCOPES[scope]: maps}}
    return GistEncoder(lm, params, config, self.trained, self.card)

  def _in_batches(self, inputs: np.ndarray, write) -> np.ndarray:
    """Applies `write` to padded batches of fixed sizes; drops the padding."""
    out = np.empty(
      (len(inputs), self.slots_per_gist, self.d_model), np.float32)

    def fill(start: int) -> None:
      batch = inputs[start : start + BATCH_SIZES[-1]]
      size = next(s for s in BATCH_SIZES if s >= len(batch))
      padding = np.zeros((size - len(batch), *inputs.shape[1:]), inputs.dtype)
      gists = write(np.concatenate([batch, padding]))
      out[start : start + len(batch)] = np.asarray(gists)[: len(batch)]

    starts = range(0, len(inputs), BATCH_SIZES[-1])
    if len(starts) <= 1:
      for start in starts:
        fill(start)
    else:
      with futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fill, starts))
    return out

  def encode(self, token_ids, run: int = 1) -> Float[np.ndarray, "n M D"]:
    """Gists [N, m, D] float32 of complete blocks of token ids [N, 32].

    Args:
      token_ids: the blocks.
      run: so many in a row are of one text, which matters to a GistNet with
        `context_blocks` alone; divides N.

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

    def write(batch: np.ndarray) -> jax.Array:
      features = _read_tokens(
        self._base, self._base_config, batch, self.config.input_layer)
      own = len(batch) if self.config.context_blocks else None
      return _encode(self.params, self.config, features, np.int32(1), own)

    ids = ids.astype(np.int32)
    if self.config.context_blocks:
      texts = ids.reshape(-1, run, BRANCHING)
      empty = np.zeros((0, self.slots_per_gist, self.d_model), np.float32)
      return np.concatenate([empty, *map(np.asarray, map(write, texts))])
    return self._in_batches(ids, write)

  def encode_tokens(self, token_ids) -> Float[np.ndarray, "n D"]:
    """L1 gists [n, D] float32 of ids [n, 32]; one vector per gist.

    Raises:
      McjaxError: as `encode`; or these gists depend on the blocks before.
    """
    if self.config.context_blocks:
      raise McjaxError("this GistNet reads the blocks before (context_blocks), "
                       "which a history does not support")
    return self._single(self.encode(token_ids))

  def encode_gists(self, gists, level: int) -> Float[np.ndarray, "n D"]:
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
      lambda batch: _encode(
        self.params, self.config, batch, np.int32(level))))

  def _single(self, gists: np.ndarray) -> np.ndarray:
    if self.slots_per_gist != 1:
      raise McjaxError(f"this GistNet writes {self.slots_per_gist} vectors per "
                       "gist; the runtime holds one")
    return gists[:, 0]


def load_gistnet(lm, path=None, lora=None) -> GistEncoder:
  """The GistNet of a base: the given weights, else the shipped, else fresh.

  Args:
    lm: a loaded base (`mcjax.load_base_lm`).
    path: of a `gistnet.safetensors`; None takes the weights shipped for
      a base of this name, or else an untrained, deterministic network that
      equals the last-token control (`trained` is False).
    lora: a PEFT folder of low-rank maps to read its gists with, see `lora.py`.

  Raises:
    McjaxError: a file is missing, unreadable or made for another base.
  """
  path = path or gist_weights.shipped_for(lm)
  if path:
    params, config, card = gist_weights.read_gistnet(path)
    encoder = GistEncoder(lm, params, config, trained=True, card=card)
  else:
    config = gist_weights.default_config(lm.params, lm.config)
    encoder = GistEncoder(
      lm, gist_weights.init_params(config), config, trained=False)
  return encoder.with_lora(lm, lora) if lora else encoder
