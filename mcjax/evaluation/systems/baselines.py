"""What a user would run instead: the same base without MegaContext.

`PlainDecoder` is a tight JAX decoder with a contiguous cache of rotated keys,
decoding a block of tokens in one device loop; `prefill` fills such a cache in
chunks, each attending only to what precedes it. `TorchDecoder` is PyTorch
transformers on the same weights, as a user runs it. `sliding_window_nll` keeps
the first and the newest tokens only (StreamingLLM, Xiao et al. 2024).
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import model, rotation
from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.types import BRANCHING, McjaxError
from mcjax.window.context_lm import ContextLM

CHUNK = 256  # tokens per prefill step
_PREFIX = 1024  # a chunk attends to the cache up to a multiple of this


class Cache(NamedTuple):
  """Rotated keys and values, one [K, S, H] array a layer."""

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


def empty_cache(config: model.DecoderConfig, size: int, dtype) -> Cache:
  """A zeroed cache for `size` tokens."""
  shape = (config.n_kv_heads, size, config.head_dim)
  def layers():
    return tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers))
  return Cache(layers(), layers())


def _put(cache: Cache, keys, values, at) -> Cache:
  """Writes rotated rows [L, K, T, H] behind token `at`."""
  def put(old, new):
    return jax.lax.dynamic_update_slice(old, new, (0, at, 0))
  return Cache(
    tuple(put(o, n) for o, n in zip(cache.keys, keys)),
    tuple(put(o, n) for o, n in zip(cache.values, values)),
  )


@functools.partial(
  jax.jit, static_argnames=("config", "count"), donate_argnums=2
)
def decode_block(params, config: model.DecoderConfig, cache: Cache,
                 start: jax.Array, logits: jax.Array, count: int
                 ) -> tuple[Cache, jax.Array, jax.Array]:
  """Greedy tokens [count] behind `start` cached ones, in one device loop.

  Args:
    params: of the base, layers unstacked where that is faster.
    config: static.
    cache: donated; at least start + count long.
    start: int32 tokens in the cache.
    logits: [V] for the first new token.
    count: static.

  Returns:
    The cache, the tokens and the logits behind them.
  """
  places = jnp.arange(cache.keys[0].shape[1], dtype=jnp.int32)
  window = _segment(params, cache, places, start)
  offsets = jnp.arange(count, dtype=jnp.int32)

  def step(i, carry):
    keys, values, tokens, logits = carry
    token = jnp.argmax(logits).astype(jnp.int32)
    block = model.Segment(
      keys, values, start + offsets, offsets < i, rotated=True
    )
    place = (start + i)[None]
    hidden, k, v = model.forward(
      params, config, model.embed(params, token[None]), place, (window, block)
    )
    k = rotation.rotate_keys(config, k, place)
    return (
      jax.lax.dynamic_update_slice(keys, k, (0, 0, i, 0)),
      jax.lax.dynamic_update_slice(values, v, (0, 0, i, 0)),
      tokens.at[i].set(token),
      model.unembed(params, hidden[0]),
    )

  shape = (config.n_layers, config.n_kv_heads, count, config.head_dim)
  fresh = jnp.zeros(shape, cache.keys[0].dtype)
  tokens = jnp.zeros(count, jnp.int32)
  keys, values, tokens, logits = jax.lax.fori_loop(
    0, count, step, (fresh, fresh, tokens, logits)
  )
  return _put(cache, keys, values, start), tokens, logits


@functools.partial(
  jax.jit, static_argnames=("config", "prefix"), donate_argnums=2
)
def _prefill_chunk(params, config, cache: Cache, token_ids, start, prefix: int):
  """Runs ids [T] from position `start`, seeing the first `prefix` slots."""
  places = jnp.arange(prefix, dtype=jnp.int32)
  before = Cache(*(tuple(a[:, :prefix] for a in half) for half in cache))
  segment = _segment(params, before, places, start)
  positions = start + jnp.arange(token_ids.shape[0], dtype=jnp.int32)
  hidden, k, v = model.forward(
    params, config, model.embed(params, token_ids), positions, (segment,)
  )
  k = rotation.rotate_keys(config, k, positions)
  return _put(cache, k, v, start), hidden


def _segment(params, cache: Cache, places, start) -> model.Segment:
  """The cache as `model.forward` wants it beside these parameters."""
  keys, values = cache
  if isinstance(params["layers"], dict):
    keys, values = jnp.stack(keys), jnp.stack(values)
  return model.Segment(keys, values, places, places < start, rotated=True)


def prefill(lm: BaseLM, token_ids: np.ndarray, cache: Cache,
            chunk: int = CHUNK) -> tuple[Cache, jax.Array]:
  """Full causal attention over ids [T], chunk by chunk.

  Args:
    lm: the base.
    token_ids: [T] int32.
    cache: donated, at least T rounded up to whole chunks long.
    chunk: tokens a step.

  Returns:
    The cache and the logits [V] for the token after the last one.
  """
  count = len(token_ids)
  padded = np.zeros(-(-count // chunk) * chunk, np.int32)
  padded[:count] = token_ids
  hidden = None
  for a in range(0, len(padded), chunk):
    cache, hidden = prefill_chunk(lm, cache, padded[a : a + chunk], a)
  return cache, _last_logits(
    lm.params, hidden, np.int32((count - 1) % chunk)
  )


def prefill_chunk(lm: BaseLM, cache: Cache, token_ids: np.ndarray, start: int
                  ) -> tuple[Cache, jax.Array]:
  """Runs ids [T] from position `start`, seeing what the cache holds before.

  Returns:
    The cache, donated and written, and the hidden states [T, D].
  """
  prefix = min(-(-start // _PREFIX) * _PREFIX, cache.keys[0].shape[1])
  return _prefill_chunk(
    lm.params, lm.config, cache, token_ids, np.int32(start), prefix)


@jax.jit
def _last_logits(params, hidden, row):
  return model.unembed(params, hidden[row])


class PlainDecoder:
  """Plain decoding behind a cache of `window` slots, full at a block's end.

  Args:
    lm: the base.
    token_ids: [window] real text; the cache holds all but a block of it.
    block: tokens a device loop.
  """

  def __init__(self, lm: BaseLM, token_ids: np.ndarray, block: int = 32):
    self.window, self.block = len(token_ids), block
    self._start = self.window - block
    self._lm = lm
    self._params = model.unstacked(lm.params)
    size = -(-self.window // CHUNK) * CHUNK
    dtype = lm.params["embed"].dtype
    cache, self._logits = prefill(
      lm, token_ids[: self._start], empty_cache(lm.config, size, dtype)
    )
    self._cache = Cache(
      *(tuple(a[:, : self.window] for a in half) for half in cache)
    )
    self.decode(1)

  def decode(self, blocks: int) -> float:
    """Seconds for `blocks` blocks, each behind the same cache."""
    begin = time.perf_counter()
    for _ in range(blocks):
      self._cache, tokens, _ = decode_block(
        self._params, self._lm.config, self._cache, np.int32(self._start),
        self._logits, self.block,
      )
      jax.block_until_ready(tokens)
    return time.perf_counter() - begin


class TorchDecoder:
  """PyTorch transformers on the same weights, as a user runs it.

  Raises:
    McjaxError: torch is not installed or the base is of another family.
  """

  def __init__(self, lm: BaseLM):
    try:
      import torch
      import transformers
    except ImportError as error:
      raise McjaxError(
        "the PyTorch baseline needs pip install 'mcjax[parity]'"
      ) from error
    c = lm.config
    if c.family != "llama" or c.qkv_bias or c.rope_scaling:
      raise McjaxError(f"no PyTorch baseline for a base of family {c.family}")
    self._torch, self._cache_type = torch, transformers.DynamicCache
    angles: dict[str, Any] = {  # as version 4 takes them, and as version 5
      "rope_theta": c.rope_theta,
      "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    config = transformers.LlamaConfig(
      vocab_size=c.vocab_size, hidden_size=c.d_model,
      intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
      num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
      head_dim=c.head_dim, tie_word_embeddings=c.tie_embeddings,
      max_position_embeddings=c.max_positions,
      rms_norm_eps=c.rms_norm_eps, **angles,
    )
    self.model = transformers.LlamaForCausalLM(config).eval()
    self.model.load_state_dict(_torch_weights(lm, torch), strict=False)
    self._cache: Any = None

  def prefill(self, token_ids: np.ndarray) -> np.ndarray:
    """Logits [V] float32 behind ids [T]; keeps the cache for `decode`."""
    torch = self._torch
    with torch.inference_mode():
      self._cache = self._cache_type()
      ids = torch.from_numpy(np.asarray(token_ids, np.int64))[None]
      out = self._forward(ids, logits_to_keep=1)
      self._next = out.logits[:, -1].argmax(-1, keepdim=True)
      return out.logits[0, -1].float().numpy()

  def decode(self, count: int) -> float:
    """Seconds for `count` greedy tokens; the cache is cut back afterwards."""
    torch = self._torch
    with torch.inference_mode():
      token = self._next
      begin = time.perf_counter()
      for _ in range(count):
        out = self._forward(token)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
      seconds = time.perf_counter() - begin
      self._cache.crop(-count)
    return seconds

  def _forward(self, ids, **more) -> Any:
    # The cache goes by its place: its name is not the same in all versions.
    return self.model(ids, None, None, self._cache, use_cache=True, **more)


def _torch_weights(lm: BaseLM, torch) -> dict:
  """State dict of a LlamaForCausalLM from the stacked parameters."""
  c, p = lm.config, lm.params
  def tensor(a):
    return torch.from_numpy(np.array(a, np.float32))
  out = {"model.embed_tokens.weight": tensor(p["embed"]),
         "lm_head.weight": tensor(
           p["unembed"].T if "unembed" in p else p["embed"]
         ),
         "model.norm.weight": tensor(p["final_norm"])}
  names = dict(wq="self_attn.q_proj", wk="self_attn.k_proj",
               wv="self_attn.v_proj", wo="self_attn.o_proj",
               w_gate="mlp.gate_proj", w_up="mlp.up_proj",
               w_down="mlp.down_proj")
  for i in range(c.n_layers):
    prefix = f"model.layers.{i}."
    for key, name in names.items():
      a = np.asarray(p["layers"][key][i])
      a = a.reshape(-1, c.d_model) if key == "wo" else a.reshape(len(a), -1)
      out[f"{prefix}{name}.weight"] = tensor(a.T)
    for key, name in (("attn_norm", "input_layernorm"),
                      ("mlp_norm", "post_attention_layernorm")):
      out[f"{prefix}{name}.weight"] = tensor(p["layers"][key][i])
  return out


class _Text:
  """Token ids where a `ContextLM` looks for a tree."""

  def __init__(self, token_ids: np.ndarray):
    self._ids = token_ids

  def tokens(self, start: int, stop: int) -> np.ndarray:
    return self._ids[start:stop]

  def gists(self, level: int, start: int, stop: int) -> np.ndarray:
    raise ValueError("a plain text has no gists")


def sliding_window_nll(lm: BaseLM, config: Config, token_ids: np.ndarray,
                       start: int) -> tuple[np.ndarray, int]:
  """NLL [T - start] in nats of ids [start:] behind a sliding window, and cost.

  `config.window` slots hold the first `sink_tokens` and the newest tokens, the
  block being scored included; positions are relative to the window, keys and
  values of tokens that stay are kept.

  Args:
    lm: the base.
    config: window and sink.
    token_ids: [T] int32.
    start: first token scored, at least 1.

  Returns:
    The losses, and how many tokens the base ran on.
  """
  context = ContextLM(lm, config, show_gists=False)
  text = _Text(np.asarray(token_ids, np.int32))
  out = []
  for a in range(start, len(token_ids), BRANCHING):
    chunk = text.tokens(a, a + BRANCHING)
    stop = a + len(chunk)
    newest = max(0, stop - (config.window - config.sink_tokens))
    kept = [*range(min(config.sink_tokens, newest)), *range(newest, stop)]
    context.window.retile([(0, i) for i in kept])
    context.load_unready(text)
    context.sync(renew=len(chunk) + 1)
    out.append(context.newest_nll(chunk))
  return np.concatenate(out), context.tokens_run
