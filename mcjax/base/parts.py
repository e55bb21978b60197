"""Parts of a checkpoint's tensors, read without the rest.

Files are read with plain reads, not mapped: what was read is not kept, so the
peak of memory is the part itself and one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import math
import struct

from etils import epath
import ml_dtypes
import numpy as np

from mcjax.types import McjaxError

_CHUNK = 1 << 22  # bytes read, or values dequantised, at a time
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16,
           "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a safetensors file: rows of equal length, one after another."""

  path: epath.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  def part(self, slices: tuple[slice, ...]) -> np.ndarray:
    """A rectangle of the tensor; rows are read whole, chunk by chunk."""
    rows, columns = slices[0], slices[1] if len(slices) > 1 else slice(0, 1)
    width = math.prod(self.shape[1:])
    out = np.empty((rows.stop - rows.start, columns.stop - columns.start),
                   self.dtype)
    step = max(1, _CHUNK // (width * self.dtype.itemsize))
    with self.path.open("rb") as file:
      for at in range(0, len(out), step):
        count = min(step, len(out) - at)
        chunk = self._read(file, (rows.start + at) * width, count * width)
        out[at : at + count] = chunk.reshape(count, width)[:, columns]
    return out if len(self.shape) > 1 else out[:, 0]

  def points(self, at: tuple[np.ndarray, ...]) -> np.ndarray:
    """Values [n] at coordinates."""
    flat = np.ravel_multi_index(at, self.shape)
    with self.path.open("rb") as file:
      return np.concatenate([self._read(file, int(i), 1) for i in flat])

  def _read(self, file, first: int, count: int) -> np.ndarray:
    file.seek(self.start + first * self.dtype.itemsize)
    raw = file.read(count * self.dtype.itemsize)
    if len(raw) != count * self.dtype.itemsize:
      raise McjaxError(f"{self.path.name} is damaged: it ends too early")
    return np.frombuffer(raw, self.dtype)


def stored_tensors(path) -> dict[str, Stored]:
  """Where the tensors of a safetensors file are.

  Raises:
    McjaxError: the file cannot be read or its header is damaged.
  """
  path = epath.Path(path)
  try:
    with path.open("rb") as file:
      size = struct.unpack("<Q", file.read(8))[0]
      header = json.loads(file.read(size))
    return {
      name: Stored(path, np.dtype(_DTYPES[entry["dtype"]]),
                   tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
      for name, entry in header.items() if name != "__metadata__"}
  except (OSError, ValueError, KeyError, struct.error) as error:
    raise McjaxError(f"{path.name} is damaged: {error}") from error


@dataclasses.dataclass(frozen=True)
class Quantised:
  """A tensor of a GGUF file.

  Attributes:
    rows: [R, bytes] or [R, width], the stored rows.
    shape: of the tensor.
    dequantise: stored rows or blocks -> float32 values.
    block: (values, bytes) of a block; (1, 1) where rows are plain numbers.
  """

  rows: np.ndarray
  shape: tuple[int, ...]
  dequantise: Callable[[np.ndarray], np.ndarray]
  block: tuple[int, int]

  def part(self, slices: tuple[slice, ...]) -> np.ndarray:
    """A rectangle of the tensor, dequantised chunk by chunk."""
    if len(self.shape) == 1:
      return self.dequantise(self.rows)[0, slices[0]]
    rows, columns = slices
    out = np.empty((rows.stop - rows.start, columns.stop - columns.start),
                   np.float32)
    step = max(1, _CHUNK // self.shape[-1])
    for at in range(0, len(out), step):
      stop = min(at + step, len(out))
      chunk = self.rows[rows.start + at : rows.start + stop]
      out[at:stop] = self.dequantise(chunk)[:, columns]
    return out

  def points(self, at: tuple[np.ndarray, ...]) -> np.ndarray:
    """Values [n] at coordinates; only their blocks are dequantised."""
    values, size = self.block
    row, column = (np.zeros_like(at[0]), at[0]) if len(at) == 1 else at
    first = column // values * size
    picked = self.rows[row[:, None], first[:, None] + np.arange(size)[None]]
    found = self.dequantise(picked)
    return found[np.arange(len(row)), column % values]
