"""GGUF files of every damage: one line each, in little time and memory."""

import struct
import time
import tracemalloc

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.base.gguf_config import decoder_config_from_gguf, folds_from_gguf
from mcjax.base.gguf_file import GgufFile
from mcjax.base.tokenizer import Tokenizer
from mcjax.testing import tiny_models
from mcjax.types import McjaxError


def _text(value: str | bytes) -> bytes:
  data = value.encode() if isinstance(value, str) else value
  return struct.pack("<Q", len(data)) + data


def _header(fields: bytes = b"", count: int = 1, tensors: int = 0,
            version: int = 3, magic: bytes = b"GGUF") -> bytes:
  return magic + struct.pack("<IQQ", version, tensors, count) + fields


def _field(key: str, kind: int, value: bytes) -> bytes:
  return _text(key) + struct.pack("<I", kind) + value


def _array(kind: int, count: int, values: bytes = b"") -> bytes:
  return struct.pack("<IQ", kind, count) + values


def _info(name: str, shape: tuple, kind: int = 0, offset: int = 0) -> bytes:
  return _text(name) + struct.pack("<I", len(shape)) + struct.pack(
    f"<{len(shape)}QIQ", *shape, kind, offset)


_HUGE = 1 << 60
_HOSTILE = {
  "empty": b"",
  "short": b"GGUF",
  "magic": _header(magic=b"GGML"),
  "version 0": _header(version=0),
  "version 1": _header(version=1),
  "big endian": _header(version=3 << 24),
  "field count": _header(count=_HUGE),
  "tensor count": _header(count=0, tensors=_HUGE),
  "array of 2**60 numbers": _header(_field("a.b", 9, _array(4, _HUGE))),
  "array of 2**60 texts": _header(_field("a.b", 9, _array(8, _HUGE))),
  "array of arrays": _header(_field("a.b", 9, _array(9, 1, _array(9, 1)))),
  "array that wraps": _header(_field("a.b", 9, _array(12, (1 << 61) + 1))),
  "text of 2**60": _header(_field("a.b", 8, struct.pack("<Q", _HUGE))),
  "key of 2**60": _header(struct.pack("<Q", _HUGE)),
  "unknown kind": _header(_field("a.b", 77, b"")),
  "bytes that are no text": _header(_field("a.b", 8, _text(b"\xff\xfe"))),
  "two fields": _header(2 * _field("a.b", 4, b"\0\0\0\0"), count=2),
  "alignment": _header(_field("general.alignment", 4, struct.pack("<I", 0))),
  "alignment 3": _header(_field("general.alignment", 4, struct.pack("<I", 3))),
  "many empty texts": _header(
    _field("a.b", 9, _array(8, 3 << 20, bytes(24 << 20)))),
  "axes": _header(_info("x", (1,) * 9), 0, 1),
  "no axes": _header(_info("x", ()), 0, 1),
  "shape of 2**180": _header(_info("x", (_HUGE,) * 3), 0, 1),
  "tensor behind the end": _header(_info("x", (8,), 0, _HUGE), 0, 1),
  "unknown quantisation": _header(_info("x", (32,), 999), 0, 1),
  "half a block": _header(_info("x", (33,), 8), 0, 1) + bytes(100),
  "two tensors": _header(_info("x", (1,)) * 2, 0, 2) + bytes(100),
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_headers_end_in_one_line(name, tmp_path):
  path = tmp_path / "m.gguf"
  path.write_bytes(_HOSTILE[name])
  tracemalloc.start()
  start = time.process_time()
  with pytest.raises(McjaxError) as caught:
    GgufFile(path)
  assert time.process_time() - start < 2
  assert tracemalloc.get_traced_memory()[1] < 200e6
  tracemalloc.stop()
  told = str(caught.value)
  assert "\n" not in told and len(told) < 300


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A small model's bytes, and what they say."""
  path = tmp_path_factory.mktemp("gguf") / "m.gguf"
  config = {**tiny_models.CONFIGS["gemma3_six"], "num_hidden_layers": 1}
  return tiny_models.write_gguf(
    path, config, tiny_models.weights(config)).read_bytes()


@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_fuzz(whole, tmp_path_factory, data):
  """Any bytes of the header changed, or the file cut: read or refused."""
  size = len(whole) - 400_000 if len(whole) > 500_000 else len(whole)
  changed = bytearray(whole)
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, min(size, 8000)))
    value = data.draw(st.binary(min_size=1, max_size=8))
    changed[at : at + len(value)] = value
  cut = data.draw(st.integers(0, len(changed)) | st.just(len(changed)))
  path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
  path.write_bytes(changed[:cut])
  try:
    file = GgufFile(path)
    decoder_config_from_gguf(file)
    folds_from_gguf(file)
    Tokenizer.from_gguf(file)
  except McjaxError as e:
    assert "\n" not in str(e)


def test_reads_what_the_gguf_package_reads(whole, tmp_path):
  import gguf

  path = tmp_path / "m.gguf"
  path.write_bytes(whole)
  mine, theirs = GgufFile(path), gguf.GGUFReader(path)
  for key, field in theirs.fields.items():
    if not key.startswith("GGUF."):
      np.testing.assert_array_equal(mine.get(key), field.contents(), key)
  assert set(mine.tensors) == {t.name for t in theirs.tensors}
  for tensor in theirs.tensors:
    want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(mine.read(tensor.name), want)


def test_a_vocabulary_of_other_kinds_is_refused(tmp_path):
  cases = {
    "ggml.tokens": _field("tokenizer.ggml.tokens", 4, bytes(4)),
    "ggml.model": _field("tokenizer.ggml.model", 4, bytes(4))
    + _field("tokenizer.ggml.tokens", 9, _array(8, 1, _text("a"))),
    "a token twice": _field(
      "tokenizer.ggml.tokens", 9, _array(8, 2, _text("a") * 2)),
    "too long pieces": _field(
      "tokenizer.ggml.tokens", 9, _array(8, 1, _text("a" * 5000)))
    + _field("tokenizer.ggml.model", 8, _text("llama"))
    + _field("tokenizer.ggml.scores", 9, _array(6, 1, bytes(4))),
  }
  for words, fields in cases.items():
    path = tmp_path / "m.gguf"
    count = fields.count(b"tokenizer.")
    path.write_bytes(_header(fields, count))
    with pytest.raises(McjaxError, match=words):
      Tokenizer.from_gguf(GgufFile(path))
