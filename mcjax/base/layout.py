"""From a checkpoint's tensors to the stacked parameters of `model.py`.

A checkpoint stores linear maps as [out, in], a tensor a layer. Each leaf says
where a parameter comes from and how it is turned; the reader fills one stacked
array after the other, and hashes a sample of every tensor on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent import futures
import dataclasses
import hashlib
import json
import math
import re
from typing import Any

import jax
import numpy as np

from mcjax.base.config import NO_FOLDS, Folds
from mcjax.base.decoder_config import DecoderConfig
from mcjax.types import McjaxError

_FIRST_FIELDS = 17  # of DecoderConfig, which enter every fingerprint
_SAMPLES = 256  # values of each tensor that enter the fingerprint
_THREADS = 2  # parameters read at a time
_ALIGNMENT = 64  # bytes; device_put adopts such arrays on CPU, uncopied
_SINGLE = ("embed", "unembed", "final_norm")  # not a tensor a layer
_PARAMETERS = _SINGLE + (
  "attn_norm", "mlp_norm", "wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down",
  "bq", "bk", "bv", "bo", "q_norm", "k_norm", "attn_post_norm",
  "mlp_post_norm")
# Tensors that carry nothing the configuration does not already say.
_IDLE_TENSORS = re.compile(
  r"rope_(freqs|factors_(long|short))\.weight|.*rotary_emb\.inv_freq")


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
    part: first row of it in a tensor that holds several, and rows of that.
    offset: added to every value.
    factor: on every value, then.
  """

  source: str
  shape: tuple[int, ...]
  turn: Callable[[np.ndarray], np.ndarray]
  axes: tuple[tuple[int, int], ...]
  rows: np.ndarray | None = None
  part: tuple[int, int] | None = None
  offset: float = 0.0
  factor: float = 1.0

  @property
  def whole(self) -> tuple[int, ...]:
    """Shape of the tensor that holds it."""
    return self.shape if self.part is None else (self.part[1], *self.shape[1:])

  def taken(self, whole: np.ndarray) -> np.ndarray:
    """The parameter in a whole tensor of the checkpoint."""
    first = self.part[0] if self.part else 0
    return self.folded(self.turn(whole[first : first + self.shape[0]]))

  def folded(self, values: np.ndarray) -> np.ndarray:
    """Values with offset and factor."""
    if self.offset:
      values = np.asarray(values, np.float32) + np.float32(self.offset)
    if self.factor != 1:
      values = np.asarray(values, np.float32) * np.float32(self.factor)
    return values

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
    if self.part is not None:
      first = self.part[0]
      out[0] = slice(out[0].start + first, out[0].stop + first)
    return tuple(out)

  def source_points(self, points: tuple[np.ndarray, ...]
                    ) -> tuple[np.ndarray, ...]:
    """Coordinates there of coordinates [n] in the parameter."""
    out = [np.zeros_like(points[0]) for _ in self.shape]
    for (axis, stride), at in zip(self.axes, points):
      out[axis] = out[axis] + at * stride
    if self.rows is not None:
      out[0] = self.rows[out[0]]
    if self.part is not None:
      out[0] = out[0] + self.part[0]
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
  config: DecoderConfig, names: dict[str, str], permuted: bool,
  folds: Folds = NO_FOLDS,
) -> dict[str, Leaf]:
  """Leaves of a checkpoint that stores linear maps as [out, in].

  Args:
    config: sizes.
    names: parameter name of `model.py` -> tensor name there. Where one tensor
      holds wq, wk and wv, or w_gate and w_up, they have the same name.
    permuted: q and k rows interleave the two halves of a head, as llama.cpp
      writes them for its adjacent-pair RoPE.
    folds: constants worked into the weights.
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
  norm = ((d,), same, (row,))
  if config.pre_norm:
    turns.update(attn_norm=norm, mlp_norm=norm)
  if config.post_norm:
    turns.update(attn_post_norm=norm, mlp_post_norm=norm)
  turns.update(
    wq=((n * h, d), lambda x: heads(halves(x)), by_head),
    wk=((k * h, d), lambda x: heads(halves(x)), by_head),
    wv=((k * h, d), heads, by_head),
    wo=((d, n * h), out_heads, ((1, h), column, row)),
    w_gate=((f, d), np.transpose, flipped),
    w_up=((f, d), np.transpose, flipped),
    w_down=((d, f), np.transpose, flipped),
    final_norm=norm,
  )
  if config.qkv_bias:
    turns.update(
      bq=((n * h,), lambda x: per_head(halves(x)), ((0, h), row)),
      bk=((k * h,), lambda x: per_head(halves(x)), ((0, h), row)),
      bv=((k * h,), per_head, ((0, h), row)),
    )
  if config.o_bias:
    turns.update(bo=((d,), same, (row,)))
  if config.qk_norm_whole:
    turns.update(q_norm=((n * h,), per_head, ((0, h), row)),
                 k_norm=((k * h,), per_head, ((0, h), row)))
  elif config.qk_norm:
    turns.update(q_norm=((h,), same, (row,)), k_norm=((h,), same, (row,)))
  parts, factors = _fused(config, names), _factors(config, folds)
  return {
    key: Leaf(names[key], shape, turn, axes, halves(np.arange(shape[0]))
              if permuted and key in ("wq", "wk", "bq", "bk") else None,
              part=parts.get(key), factor=factors.get(key, 1.0),
              offset=folds.norm_offset if key.endswith("norm") else 0.0)
    for key, (shape, turn, axes) in turns.items()
  }


def _factors(config: DecoderConfig, folds: Folds) -> dict[str, float]:
  """Factors on parameters that do what the folds ask for."""
  # Logits are divided by what a tied embedding was multiplied by.
  tied = folds.embed if config.tie_embeddings else 1.0
  # A norm has the last word on what it scales.
  queries = ("q_norm",) if config.qk_norm else ("wq", "bq")
  blocks = ("wo", "bo", "w_down")
  if config.post_norm:
    blocks = ("attn_post_norm", "mlp_post_norm")
  return {"embed": folds.embed, "final_norm": folds.logits / tied,
          **dict.fromkeys(queries, folds.query),
          **dict.fromkeys(blocks, folds.residual)}


def _fused(
  config: DecoderConfig, names: dict[str, str]
) -> dict[str, tuple[int, int]]:
  """First row and rows of the whole, of parts that share a tensor (Phi-3)."""
  h, f = config.head_dim, config.d_ff
  n, k = config.n_heads * h, config.n_kv_heads * h
  parts = {}
  if names["wq"] == names["wk"]:
    total = n + 2 * k
    parts.update(wq=(0, total), wk=(n, total), wv=(n + k, total))
  if names["w_gate"] == names["w_up"]:
    parts.update(w_gate=(0, 2 * f), w_up=(f, 2 * f))
  return parts


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
      tensors.check(source, leaf.whole)
      digest.update(f"{key} {i} {leaf.turned}".encode())
      points = leaf.source_points(_sample_points(leaf.turned))
      values = leaf.folded(tensors.points(source, points))
      digest.update(values.astype("<f4").tobytes())
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
        row[...] = leaf.folded(leaf.turn(tensors.part(source, cut)))
      _check_finite(leaf.source, out)
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
  for leaf in leaves.values():  # before memory is taken for all layers
    for source in _sources(leaf, config.n_layers):
      tensors.check(source, leaf.whole)
  digest = hashlib.sha256(_config_text(config).encode())
  params: dict[str, Any] = {"layers": {}}

  def read(item: tuple[str, Leaf]) -> tuple[np.ndarray, bytes]:
    return _read_leaf(*item, tensors, config.n_layers, dtype)

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    for (key, leaf), (value, facts) in zip(
        leaves.items(), pool.map(read, leaves.items())):
      digest.update(facts)
      into = params["layers"] if "{i}" in leaf.source else params
      into[key] = jax.device_put(value)
  known = {source for leaf in leaves.values()
           for source in _sources(leaf, config.n_layers)}
  _check_all_used(tensors.shapes, known, leaves)
  return params, digest


def _sources(leaf: Leaf, layers: int) -> list[str]:
  """The tensors of a leaf: one, or one of each layer."""
  if "{i}" not in leaf.source:
    return [leaf.source]
  return [leaf.source.replace("{i}", str(i)) for i in range(layers)]


def _read_leaf(key: str, leaf: Leaf, tensors: Tensors, layers: int,
               dtype: np.dtype) -> tuple[np.ndarray, bytes]:
  """A leaf [L, ...], or without L, and what enters the fingerprint of it."""
  facts, out = b"", np.empty(0, dtype)
  for i, source in enumerate(_sources(leaf, layers)):
    value = leaf.taken(tensors.read(source, leaf.whole))
    facts += f"{key} {i} {value.shape}".encode() + _sample(value)
    if "{i}" not in leaf.source:
      out = np.ascontiguousarray(value, dtype)
      break
    if i == 0:
      out = aligned_empty((layers, *value.shape), dtype)
    out[i] = value
  _check_finite(leaf.source, out)
  return out, facts


def _config_text(config: DecoderConfig) -> str:
  """The configuration as it enters a fingerprint; later fields if they say
  anything."""
  fields = dataclasses.asdict(config)
  for field in dataclasses.fields(config)[_FIRST_FIELDS:]:
    if fields[field.name] == field.default:
      del fields[field.name]
  return json.dumps(fields, sort_keys=True)


def _check_finite(name: str, value: np.ndarray) -> None:
  """Refuses weights that would make every answer NaN."""
  with np.errstate(all="ignore"):
    total = np.sum(value, dtype=np.float32)
  if not np.isfinite(total):
    raise McjaxError(f"{name!r} holds NaN or infinite values")


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
