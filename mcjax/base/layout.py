"""From a checkpoint's tensors to the stacked parameters of `model.py`.

A checkpoint stores linear maps as [out, in], a tensor a layer. Each leaf says
where a parameter comes from and how it is turned; the reader fills one stacked
array after the other, and hashes a sample of every tensor on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import hashlib
import json
import math
import re
from typing import Any

import jax
import numpy as np

from mcjax.base.model import DecoderConfig
from mcjax.types import McjaxError

_SAMPLES = 256  # values of each tensor that enter the fingerprint
_ALIGNMENT = 64  # bytes; device_put adopts such arrays on CPU, uncopied
# Tensors that carry nothing the configuration does not already say.
_IDLE_TENSORS = re.compile(r"rope_freqs\.weight|.*rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One tensor of a layer: where it is, its shape there, how it is turned."""

  source: str
  shape: tuple[int, ...]
  turn: Callable[[np.ndarray], np.ndarray]


class Tensors:
  """Named tensors of a checkpoint, read on demand in their stored dtype."""

  def __init__(
    self,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
  ):
    self.shapes, self._read = shapes, read

  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in self.shapes:
      raise McjaxError(f"the checkpoint has no tensor {name!r}")
    if self.shapes[name] != shape:
      raise McjaxError(
        f"tensor {name!r} has shape {self.shapes[name]}, expected {shape}"
      )
    return self._read(name)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """An uninitialised array whose memory JAX can adopt on CPU."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % _ALIGNMENT
  return raw[start : start + size].view(dtype).reshape(shape)


def leaves_of(
  config: DecoderConfig, names: dict[str, str], permuted: bool
) -> dict[str, Leaf]:
  """Leaves of a checkpoint that stores linear maps as [out, in].

  Args:
    config: sizes.
    names: parameter name of `model.py` -> tensor name there.
    permuted: q and k rows interleave the two halves of a head, as llama.cpp
      writes them for its adjacent-pair RoPE.
  """
  d, f, h = config.d_model, config.d_ff, config.head_dim
  n, k, v = config.n_heads, config.n_kv_heads, config.vocab_size

  def halves(x: np.ndarray) -> np.ndarray:
    """[heads * H, ...] rows from adjacent pairs back to split halves."""
    if not permuted:
      return x
    pairs = x.reshape(-1, h // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)

  def heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, h, d).transpose(2, 0, 1)

  def per_head(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, h)

  def same(x: np.ndarray) -> np.ndarray:
    return x

  turns: dict[str, Any] = dict(
    embed=((v, d), same))  # the largest first, for a low peak
  if not config.tie_embeddings:
    turns.update(unembed=((v, d), np.transpose))
  turns.update(
    attn_norm=((d,), same),
    mlp_norm=((d,), same),
    wq=((n * h, d), lambda x: heads(halves(x))),
    wk=((k * h, d), lambda x: heads(halves(x))),
    wv=((k * h, d), heads),
    wo=((d, n * h), lambda x: x.T.reshape(n, h, d)),
    w_gate=((f, d), np.transpose),
    w_up=((f, d), np.transpose),
    w_down=((d, f), np.transpose),
    final_norm=((d,), same),
  )
  if config.qkv_bias:
    turns.update(
      bq=((n * h,), lambda x: per_head(halves(x))),
      bk=((k * h,), lambda x: per_head(halves(x))),
      bv=((k * h,), per_head),
    )
  if config.o_bias:
    turns.update(bo=((d,), same))
  if config.qk_norm:
    turns.update(q_norm=((h,), same), k_norm=((h,), same))
  return {key: Leaf(names[key], *turn) for key, turn in turns.items()}


def read_params(
  config: DecoderConfig,
  tensors: Tensors,
  leaves: dict[str, Leaf],
  dtype: np.dtype,
) -> tuple[dict, Any]:
  """Reads all leaves; returns the parameters and a hash of what was read."""
  known = set()
  digest = hashlib.sha256(_config_text(config).encode())
  params: dict[str, Any] = {"layers": {}}
  for key, leaf in leaves.items():
    stacked = "{i}" in leaf.source
    layers = range(config.n_layers) if stacked else range(1)
    out = value = np.empty(0, dtype)
    for i in layers:
      source = leaf.source.replace("{i}", str(i))
      known.add(source)
      value = leaf.turn(tensors.read(source, leaf.shape))
      digest.update(f"{key} {i} {value.shape}".encode())
      digest.update(_sample(value))
      if stacked and i == 0:
        out = aligned_empty((len(layers), *value.shape), dtype)
      if stacked:
        out[i] = value
    if stacked:
      params["layers"][key] = jax.device_put(out)
    else:
      params[key] = jax.device_put(np.ascontiguousarray(value, dtype))
    del value, out
  _check_all_used(tensors.shapes, known, leaves)
  return params, digest


def _config_text(config: DecoderConfig) -> str:
  return json.dumps(dataclasses.asdict(config), sort_keys=True)


def _sample(value: np.ndarray) -> bytes:
  """Evenly spaced values of a tensor as float32 bytes."""
  step = max(1, value.size // _SAMPLES)
  index = np.unravel_index(np.arange(0, value.size, step), value.shape)
  return value[index].astype("<f4").tobytes()


def _check_all_used(
  names: Iterable[str], known: set[str], leaves: dict[str, Leaf]
) -> None:
  """Refuses tensors (biases, adapters) that the decoder would leave out."""
  tied = () if "unembed" in leaves else ("lm_head.weight",)
  for name in names:
    if name in known or name in tied or _IDLE_TENSORS.fullmatch(name):
      continue
    raise McjaxError(f"tensor {name!r} has no place in this decoder")
