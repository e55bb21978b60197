"""Reads a GGUF file: its metadata, and tensors as rows of stored bytes.

The file is mapped into memory, and every count in it is held against what is
left of the file before anything is made of it. So a damaged or hostile header
costs no more than reading it does. Tensors are dequantised by the `gguf`
package.
"""

from __future__ import annotations

import math
import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np

from mcjax.base.parts import Quantised
from mcjax.types import McjaxError

MAX_STRINGS = 1 << 21  # in one array; the largest vocabulary has 2**18
MAX_FIELDS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_NAME = 1 << 10  # bytes of a key or of a tensor's name
_MAX_HEADER = 1 << 26  # bytes of all strings
_STRING, _ARRAY = 8, 9
_TOGETHER = 16  # rows that gguf takes as one: it works in groups of 16
_ALIGNMENTS = [1 << i for i in range(21)]
_SCALARS = {
  0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
  7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}
_LENGTH = struct.Struct("<Q")


class Tensor(NamedTuple):
  """Where a tensor lies.

  Attributes:
    shape: as NumPy has it, rows first.
    kind: how it is quantised.
    start: first byte in the file.
    size: in bytes.
  """

  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  start: int
  size: int


class GgufFile:
  """An open GGUF file.

  Attributes:
    fields: metadata; arrays of numbers are NumPy views of the file.
    tensors: by name.
  """

  def __init__(self, path: pathlib.Path):
    """Maps and reads the header.

    Raises:
      McjaxError: the file cannot be read or is no whole GGUF file.
    """
    try:
      with path.open("rb") as file:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:  # an empty file cannot be mapped
      raise McjaxError(f"not a whole GGUF file: {e}") from e
    self._at, self._strings = 0, 0
    self.fields: dict[str, Any] = {}
    self.tensors: dict[str, Tensor] = {}
    self._read_header()

  def get(self, key: str, default: Any = None) -> Any:
    """A field of the metadata."""
    return self.fields.get(key, default)

  def read(self, name: str) -> np.ndarray:
    """A tensor in float32."""
    tensor = self.stored(name)
    if len(tensor.shape) > 2:
      raise McjaxError(f"{name!r} has {len(tensor.shape)} axes")
    return tensor.part(tuple(slice(0, n) for n in tensor.shape))

  def stored(self, name: str) -> Quantised:
    """A tensor as it lies in the file, to be read in parts."""
    tensor = self.tensors[name]
    raw = np.frombuffer(self._map, np.uint8, tensor.size, tensor.start)
    rows = math.prod(tensor.shape[:-1])

    def dequantise(rows: np.ndarray) -> np.ndarray:
      wide = rows.reshape(-1, rows.shape[1] * math.gcd(len(rows), _TOGETHER))
      try:
        found = gguf.quants.dequantize(wide, tensor.kind)
        return found.reshape(len(rows), -1)
      except NotImplementedError as e:
        raise McjaxError(
          f"{name!r} is quantised as {tensor.kind.name}, which the gguf "
          "package cannot read"
        ) from e

    return Quantised(
      raw.reshape(rows, -1) if rows else raw.reshape(0, 1), tensor.shape,
      dequantise, gguf.GGML_QUANT_SIZES[tensor.kind])

  # --- header ---------------------------------------------------------------

  def _read_header(self) -> None:
    if self._map[:4] != b"GGUF":
      raise _broken("it does not begin with GGUF")
    self._at = 4
    version = self._scalar(4, "version")
    if version not in (2, 3):
      raise McjaxError(f"unsupported GGUF version {version}; known: 2, 3")
    tensors = self._count(8 + 4 + 4 + 8, MAX_TENSORS, "tensor count")
    fields = self._count(8 + 4 + 1, MAX_FIELDS, "field count")
    for _ in range(fields):
      key = self._string("a key", MAX_NAME)
      if key in self.fields:
        raise _broken(f"it has two fields {key!r}")
      self.fields[key] = self._value(self._scalar(4, key), key)
    found = [self._tensor() for _ in range(tensors)]
    step = self.fields.get("general.alignment", 32)
    if not isinstance(step, int) or step not in _ALIGNMENTS:
      raise _broken(f"general.alignment is {step!r}")
    start = -(-self._at // step) * step
    for name, shape, kind, offset in found:
      self._place(name, shape, kind, start + offset)

  def _place(self, name: str, shape, kind: int, start: int) -> None:
    if name in self.tensors:
      raise _broken(f"it has two tensors {name!r}")
    try:
      stored = gguf.GGMLQuantizationType(kind)
    except ValueError as e:
      raise McjaxError(f"{name!r} is of the unknown type {kind}") from e
    block, width = gguf.GGML_QUANT_SIZES[stored]
    if not shape or shape[-1] % block:
      raise _broken(f"{name!r} of shape {shape} is no {stored.name}")
    size = math.prod(shape) // block * width
    if start + size > len(self._map):
      raise _broken(f"{name!r} ends behind the end of the file")
    self.tensors[name] = Tensor(shape, stored, start, size)

  def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
    name = self._string("a tensor's name", MAX_NAME)
    count = self._scalar(4, name)
    if count > 4:
      raise _broken(f"{name!r} has {count} axes")
    shape = [self._scalar(10, name) for _ in range(count)]
    kind, offset = self._scalar(4, name), self._scalar(10, name)
    return name, tuple(shape[::-1]), kind, offset

  def _value(self, kind: int, key: str) -> Any:
    if kind == _STRING:
      return self._string(key)
    if kind != _ARRAY:
      return self._scalar(kind, key)
    kind = self._scalar(4, key)
    if kind == _STRING:
      count = self._count(8, MAX_STRINGS, key)
      return [self._string(key) for _ in range(count)]
    if kind not in _SCALARS:
      raise _broken(f"{key!r} is an array of type {kind}")
    dtype = np.dtype(_SCALARS[kind])
    count = self._count(dtype.itemsize, len(self._map), key)
    values = np.frombuffer(self._map, dtype, count, self._at)
    self._at += count * dtype.itemsize
    return values

  def _scalar(self, kind: int, key: str) -> Any:
    if kind not in _SCALARS:
      raise _broken(f"{key!r} is of type {kind}")
    dtype = np.dtype(_SCALARS[kind])
    self._need(dtype.itemsize, key)
    value = np.frombuffer(self._map, dtype, 1, self._at)[0].item()
    self._at += dtype.itemsize
    return value

  def _count(self, least: int, most: int, key: str) -> int:
    """A number of things that take `least` bytes each."""
    count = self._scalar(10, key)
    if count > most or count * least > len(self._map) - self._at:
      raise _broken(f"{key!r} has {count} entries, more than there can be")
    return count

  def _string(self, key: str, most: int = _MAX_HEADER) -> str:
    self._need(8, key)
    (size,) = _LENGTH.unpack_from(self._map, self._at)
    self._at += 8
    self._strings += size
    if size > most or self._strings > _MAX_HEADER:
      raise _broken(f"the text of {key!r} has {size} bytes")
    self._need(size, key)
    raw = self._map[self._at : self._at + size]
    self._at += size
    try:
      return raw.decode()
    except UnicodeDecodeError as e:
      raise _broken(f"{key!r} is not UTF-8 text") from e

  def _need(self, size: int, key: str) -> None:
    if size > len(self._map) - self._at:
      raise _broken(f"it ends within {key!r}")


def _broken(why: str) -> McjaxError:
  return McjaxError(f"not a whole GGUF file: {why}")
