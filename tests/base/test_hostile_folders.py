"""Folders of a model that are damaged or meant to do harm."""

import json
import os
import struct
import time
import tracemalloc

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from mcjax.base.load import load_base_lm
from mcjax.base.tokenizer import Tokenizer
from mcjax.testing import tiny_models
from mcjax.types import McjaxError

_CONFIG = {**tiny_models.CONFIGS["llama"], "num_hidden_layers": 1}
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json",
          "generation_config.json", "chat_template.jinja", "model.safetensors")


@pytest.fixture
def folder(tmp_path):
  return tiny_models.write_folder(
    tmp_path / "m", _CONFIG, tiny_models.weights(_CONFIG))


def _refusal(source) -> str:
  """What is said of a source, in one line and at little cost."""
  tracemalloc.start()
  start = time.process_time()
  try:
    with pytest.raises(McjaxError) as caught:
      load_base_lm(source)
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 200e6
  finally:
    tracemalloc.stop()
  told = str(caught.value)
  assert "\n" not in told and len(told) < 1000
  return told


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_read(folder, name, kind):
  path = folder / name
  path.unlink(missing_ok=True)
  if kind == "pipe":
    os.mkfifo(path)
  elif kind == "folder":
    path.mkdir()
  else:
    path.symlink_to("/dev/zero")
  assert f"{name} is not a regular file" in _refusal(folder)


def test_a_pipe_in_place_of_a_gguf_file(tmp_path):
  os.mkfifo(tmp_path / "m.gguf")
  assert "m.gguf" in _refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize(
  "name", ["config.json", "tokenizer_config.json", "generation_config.json",
           "tokenizer.json"])
@pytest.mark.parametrize(
  "text", ["", "[]", "[" * 100_000, '{"a":' * 50_000, "\xff", "nul", '{"a"'])
def test_json_that_is_none(folder, name, text):
  (folder / name).write_bytes(text.encode("latin-1"))
  assert name in _refusal(folder)


def test_long_files_are_not_read(folder):
  for name in ("config.json", "chat_template.jinja"):
    with (folder / name).open("ab") as file:
      file.truncate(1 << 36)  # a hole of 64 GiB
    assert f"{name} is longer than" in _refusal(folder)
    (folder / name).unlink()
    if name == "config.json":
      (folder / name).write_text(json.dumps(_CONFIG))


def _header(header: dict | bytes, size: int | None = None) -> bytes:
  data = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(data) if size is None else size) + data


def _entry(shape, begin=0, end=4, dtype="F32") -> dict:
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"\0" * 8,
    _header(b"{}", 1 << 62),
    _header(b"{}", (1 << 64) - 1),
    _header(b"{" * 100),
    _header({"x": _entry([1 << 40, 1 << 40])}),
    _header({"x": _entry([1], 0, 1 << 60)}),
    _header({"x": _entry([1], 4, 0)}),
    _header({"x": _entry([-1])}),
    _header({"x": _entry([1], dtype="F999")}),
    _header({"x": {"dtype": "F32"}}),
    _header({"x": _entry([1])}) + b"\0" * 3,
  ],
)
def test_hostile_safetensors(folder, data):
  (folder / "model.safetensors").write_bytes(data)
  assert "model.safetensors" in _refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  "name", ["model.embed_tokens.weight", "model.norm.weight",
           "model.layers.0.mlp.up_proj.weight"])
def test_weights_that_are_no_numbers(tmp_path, name, value):
  tensors = tiny_models.weights(_CONFIG)
  tensors[name].flat[-1] = value
  folder = tiny_models.write_folder(tmp_path / "m", _CONFIG, tensors)
  assert "NaN or infinite" in _refusal(folder)


def test_a_million_layers_take_no_memory(folder):
  for field, value in (("num_hidden_layers", 1000), ("hidden_size", 1 << 17),
                       ("num_hidden_layers", 10**9), ("vocab_size", 1 << 24)):
    (folder / "config.json").write_text(
      json.dumps({**_CONFIG, "head_dim": 16, field: value}))
    assert field in (told := _refusal(folder)) or "tensor" in told


def test_pickled_weights_are_refused_with_what_to_do(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  told = _refusal(folder)
  assert ".bin" in told and "save_pretrained" in told


def _tokenizer_json(**changes) -> dict:
  whole = json.loads(tiny_models.byte_tokenizer().to_str())
  return {**whole, **changes}


def _doubling(count: int) -> list[dict]:
  return [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
          for _ in range(count)]


_HOSTILE = dict(
  doubling=_tokenizer_json(
    normalizer={"type": "Sequence", "normalizers": _doubling(30)}),
  decoding=_tokenizer_json(
    decoder={"type": "Sequence", "decoders": _doubling(30)}),
  between=_tokenizer_json(normalizer={
    "type": "Replace", "pattern": {"Regex": "x*"}, "content": "a" * 5000}),
  regex=_tokenizer_json(pre_tokenizer={
    "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
    "invert": False}),
  model=_tokenizer_json(model={"type": "BPE", "vocab": [], "merges": {}}),
  merges=_tokenizer_json(model={
    "type": "BPE", "vocab": {"a": 0}, "merges": ["a zz"]}),
  negative=_tokenizer_json(model={
    "type": "BPE", "vocab": {"a": -1}, "merges": []}),
  far=_tokenizer_json(model={
    "type": "BPE", "vocab": {"a": 0, "b": 4294967295}, "merges": []}),
  empty=_tokenizer_json(model={"type": "BPE", "vocab": {}, "merges": []},
                        added_tokens=[]),
  charsmap=_tokenizer_json(normalizer={
    "type": "Precompiled", "precompiled_charsmap": "AAAA"}),
)


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_tokenizers(folder, name):
  (folder / "tokenizer.json").write_text(json.dumps(_HOSTILE[name]))
  assert "token" in _refusal(folder)


def test_a_tokenizer_that_pads_to_any_length_does_not(folder):
  padded = _tokenizer_json(padding={
    "strategy": {"Fixed": 1 << 40}, "direction": "Right",
    "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "!"})
  (folder / "tokenizer.json").write_text(json.dumps(padded))
  assert len(load_base_lm(folder).tokenizer.encode("abc")) == 3


@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
def test_fuzz_tokenizers(tmp_path_factory, data):
  """Any part of tokenizer.json replaced: read, or one line."""
  whole = _tokenizer_json()
  value = st.recursive(
    st.none() | st.integers(-2, 1 << 70) | st.text(max_size=4) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
      st.sampled_from(["type", "pattern", "String", "Regex", "content",
                       "vocab", "merges", "normalizers", "behavior"]),
      inner | st.sampled_from(["Replace", "Split", "Sequence", "BPE", "("]),
      max_size=4), max_leaves=8)
  key = data.draw(st.sampled_from(sorted(whole)))
  if key == "model" and data.draw(st.booleans()):
    part = data.draw(st.sampled_from(sorted(whole["model"])))
    whole["model"][part] = data.draw(value)
  else:
    whole[key] = data.draw(value)
  path = tmp_path_factory.getbasetemp() / "fuzz-tokenizer"
  path.mkdir(exist_ok=True)
  (path / "tokenizer.json").write_text(json.dumps(whole))
  (path / "tokenizer_config.json").write_text(json.dumps(
    data.draw(st.dictionaries(st.sampled_from(
      ["eos_token", "bos_token", "chat_template", "add_bos_token"]), value))))
  try:
    tokenizer = Tokenizer.from_folder(path)
    tokenizer.decode(tokenizer.encode("a b\nc"))
  except McjaxError as e:
    assert "\n" not in str(e)
