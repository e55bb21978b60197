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
_SINGLE = ("embed", "unembed", "final_norm")  # not a tensor a layer
_PARAMETERS = _SINGLE + (
  "attn_norm", "mlp_norm", "wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down",
  "bq", "bk", "bv", "bo", "q_norm", "k_norm")
# Tensors that carry nothing the configuration does not already say.
_IDLE_TENSORS = re.compile(r"rope_freqs\.weight|.*rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One tensor of a layer: where it is, its shape there, how it is turned.

  Attributes:
    source: the tensor's name; `{i}` stands for the layer.
    shape: its shape in the checkpoint.
    turn: from there to the parameter; also turns parts that hold whole heads.
    axes: for every axis of the parameter, the axis of the checkpoint's tensor
      that it walks along, and its stride there.
    rows: which row of the checkpoint each row is, if they are permuted.
  """

  source: str
  shape: tuple[int, ...]
  turn: Callable[[np.ndarray], np.ndarray]
  axes: tuple[tuple[int, int], ...]
  rows: np.ndarray | None = None

  @property
  def turned(self) -> tuple[int, ...]:
    """Shape of the parameter, of one layer."""
    sizes = list(self.shape)
    out = []
    for axis, stride in self.axes:
      out.append(sizes[axis] // stride)
      sizes[axis] = stride
    return tuple(out)

  def cut(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The part of the checkpoint's tensor that holds a part of the parameter.

    An axis with a stride is cut; those inside it are whole.
    """
    out = [slice(0, n) for n in self.shape]
    for (axis, stride), piece, size in zip(self.axes, index, self.turned):
      start, stop, _ = piece.indices(size)
      if stop - start < size:
        out[axis] = slice(start * stride, stop * stride)
    return tuple(out)

  def source_points(self, points: tuple[np.ndarray, ...]
                    ) -> tuple[np.ndarray, ...]:
    """Coordinates there of coordinates [n] in the parameter."""
    out = [np.zeros_like(points[0]) for _ in self.shape]
    for (axis, stride), at in zip(self.axes, points):
      out[axis] = out[axis] + at * stride
    if self.rows is not None:
      out[0] = self.rows[out[0]]
    return tuple(out)


class Tensors:
  """Named tensors of a checkpoint, read on demand in their stored dtype.

  Args:
    shapes: of all tensors.
    read: name -> the tensor.
    part: (name, slices) -> a part of it, without reading the rest.
    points: (name, coordinates) -> values [n] at coordinates.
  """

  def __init__(
    self,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    part: Callable[[str, tuple[slice, ...]], np.ndarray],
    points: Callable[[str, tuple[np.ndarray, ...]], np.ndarray],
  ):
    self.shapes, self._read = shapes, read
    self.part, self.points = part, points

  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A whole tensor, which must have this shape."""
    self.check(name, shape)
    return self._read(name)

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises McjaxError if the tensor is missing or has another shape."""
    if name not in self.shapes:
      raise McjaxError(f"the checkpoint has no tensor {name!r}")
    if self.shapes[name] != shape:
      raise McjaxError(
        f"tensor {name!r} has shape {self.shapes[name]}, expected {shape}"
      )


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
    return x.reshape(-1, h, x.shape[-1]).transpose(2, 0, 1)

  def out_heads(x: np.ndarray) -> np.ndarray:
    return x.T.reshape(-1, h, x.shape[0])

  def per_head(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, h)

  def same(x: np.ndarray) -> np.ndarray:
    return x

  row, column = (0, 1), (1, 1)
  flipped = (column, row)
  by_head = (column, (0, h), row)
  turns: dict[str, Any] = dict(  # the largest first
    embed=((v, d), same, (row, column)))
  if not config.tie_embeddings:
    turns.update(unembed=((v, d), np.transpose, flipped))
  turns.update(
    attn_norm=((d,), same, (row,)),
    mlp_norm=((d,), same, (row,)),
    wq=((n * h, d), lambda x: heads(halves(x)), by_head),
    wk=((k * h, d), lambda x: heads(halves(x)), by_head),
    wv=((k * h, d), heads, by_head),
    wo=((d, n * h), out_heads, ((1, h), column, row)),
    w_gate=((f, d), np.transpose, flipped),
    w_up=((f, d), np.transpose, flipped),
    w_down=((d, f), np.transpose, flipped),
    final_norm=((d,), same, (row,)),
  )
  if config.qkv_bias:
    turns.update(
      bq=((n * h,), lambda x: per_head(halves(x)), ((0, h), row)),
      bk=((k * h,), lambda x: per_head(halves(x)), ((0, h), row)),
      bv=((k * h,), per_head, ((0, h), row)),
    )
  if config.o_bias:
    turns.update(bo=((d,), same, (row,)))
  if config.qk_norm:
    turns.update(q_norm=((h,), same, (row,)), k_norm=((h,), same, (row,)))
  return {
    key: Leaf(names[key], shape, turn, axes, halves(np.arange(shape[0]))
              if permuted and key in ("wq", "wk", "bq", "bk") else None)
    for key, (shape, turn, axes) in turns.items()
  }


def param_shapes(config: DecoderConfig) -> dict:
  """Shapes of all parameters of `model.py`, as their pytree."""
  names = {key: key for key in _PARAMETERS}
  shapes: dict[str, Any] = {"layers": {}}
  for key, leaf in leaves_of(config, names, permuted=False).items():
    if key in _SINGLE:
      shapes[key] = leaf.turned
    else:
      shapes["layers"][key] = (config.n_layers, *leaf.turned)
  return shapes


def read_sharded(
  config: DecoderConfig,
  tensors: Tensors,
  leaves: dict[str, Leaf],
  dtype: np.dtype,
  shardings: dict,
) -> tuple[dict, Any]:
  """As `read_params`, but every device's part is read alone.

  Args:
    config: sizes.
    tensors: of the checkpoint.
    leaves: where the parameters are.
    dtype: of the parameters.
    shardings: pytree of NamedShardings, as `param_shapes`.

  Returns:
    the parameters on the mesh, of which this process holds only what its
    devices do, and the same hash as `read_params`.
  """
  known: set[str] = set()
  digest = hashlib.sha256(_config_text(config).encode())
  params: dict[str, Any] = {"layers": {}}
  for key, leaf in leaves.items():
    stacked = "{i}" in leaf.source
    sources = [leaf.source.replace("{i}", str(i))
               for i in range(config.n_layers if stacked else 1)]
    known.update(sources)
    for i, source in enumerate(sources):
      tensors.check(source, leaf.shape)
      digest.update(f"{key} {i} {leaf.turned}".encode())
      points = leaf.source_points(_sample_points(leaf.turned))
      digest.update(tensors.points(source, points).astype("<f4").tobytes())
    group = params["layers"] if stacked else params
    sharding = (shardings["layers"] if stacked else shardings)[key]
    group[key] = _placed(tensors, leaf, sources, stacked, sharding, dtype)
  _check_all_used(tensors.shapes, known, leaves)
  return params, digest


def _placed(tensors: Tensors, leaf: Leaf, sources: list[str], stacked: bool,
            sharding, dtype: np.dtype) -> jax.Array:
  """A parameter on the mesh, read device by device."""
  shape = ((len(sources),) if stacked else ()) + leaf.turned
  pieces, known = [], {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    place = tuple(s.indices(n)[:2] for s, n in zip(index, shape))
    if place not in known:  # replicas are read once
      layers = index[0] if stacked else slice(None)
      part = index[1:] if stacked else index
      cut = leaf.cut(part)
      size = tuple(b - a for a, b in place)
      out = aligned_empty(size, dtype)
      rows = out if stacked else out[None]
      for row, source in zip(rows, sources[layers], strict=True):
        row[...] = leaf.turn(tensors.part(source, cut))
      known[place] = out
    pieces.append(jax.device_put(known[place], device))
  return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


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


def _sample_points(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
  """Coordinates, evenly spaced, of the values that enter the fingerprint."""
  size = math.prod(shape)
  step = max(1, size // _SAMPLES)
  return np.unravel_index(np.arange(0, size, step), shape)


def _sample(value: np.ndarray) -> bytes:
  """Evenly spaced values of a tensor as float32 bytes."""
  return value[_sample_points(value.shape)].astype("<f4").tobytes()


def _check_all_used(
  names: Iterable[str], known: set[str], leaves: dict[str, Leaf]
) -> None:
  """Refuses tensors (biases, adapters) that the decoder would leave out."""
  tied = () if "unembed" in leaves else ("lm_head.weight",)
  for name in names:
    if name in known or name in tied or _IDLE_TENSORS.fullmatch(name):
      continue
    raise McjaxError(f"tensor {name!r} has no place in this decoder")
