"""Weights files that are damaged or meant to do harm: one line each."""

import json
import os
import struct

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
from safetensors.numpy import save_file

from mcjax import load_gistnet, load_lensnet, pretrained
from mcjax.gist import weights as gist_weights
from mcjax.gist.network import GistNetConfig
from mcjax.testing import tiny_base
from mcjax.types import McjaxError


@pytest.fixture(scope="module")
def lm():
  return tiny_base.make_lm()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lm):
  """Tensors and metadata of a GistNet's file."""
  config = gist_weights.default_config(lm.params, lm.config)
  path = tmp_path_factory.mktemp("w") / "gistnet.safetensors"
  gist_weights.save_gistnet(path, gist_weights.init_params(config), config, {})
  with pretrained.safe_open(path, framework="numpy") as file:
    tensors = {k: file.get_tensor(k) for k in file.keys()}
    return tensors, dict(file.metadata())


def _refusal(lm, path, load=load_gistnet) -> str:
  with pytest.raises(McjaxError) as caught:
    load(lm, path)
  told = str(caught.value)
  assert str(path) in told and "\n" not in told and len(told) < 600
  return told


def _write(path, whole, tensors=None, changes=None, **metadata):
  fields = json.loads(whole[1]["config"]) | (changes or {})
  save_file({**whole[0], **(tensors or {})}, path, metadata={
    **whole[1], "config": json.dumps(fields), **metadata})
  return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_numbers(whole, lm, tmp_path, value):
  for name in list(whole[0])[:3]:
    bad = whole[0][name].copy()
    bad.flat[0] = value
    path = _write(tmp_path / "g.safetensors", whole, {name: bad})
    assert name in _refusal(lm, path)


@pytest.mark.parametrize(
  "config, words",
  [
    ({"rounds": 10**9}, "rounds"),
    ({"children_layers": 10**9}, "children_layers"),
    ({"width": 0}, "configuration"),
    ({"heads": 0}, "configuration"),
    ({"heads": 7}, "configuration"),
    ({"width": "96"}, "width"),
    ({"width": None}, "width"),
    ({"width": [96]}, "width"),
    ({"width": 1 << 40}, "width"),
    ({"input_rms": float("nan")}, "input_rms"),
    ({"no_such": 1}, "no_such"),
    ({"width": 48}, "fit"),
    ({"levels": -1}, "configuration"),
  ],
)
def test_absurd_settings(whole, lm, tmp_path, config, words):
  path = _write(tmp_path / "g.safetensors", whole, changes=config)
  assert words in _refusal(lm, path)


@pytest.mark.parametrize(
  "metadata, words",
  [
    ({"version": "0"}, "format version 0"),
    ({"version": "99"}, "format version 99"),
    ({"format": "other"}, "no gistnet weights"),
    ({"config": "{"}, "'config'"),
    ({"config": "[]"}, "'config'"),
    ({"card": "[" * 100_000}, "'card'"),
  ],
)
def test_metadata(whole, lm, tmp_path, metadata, words):
  path = _write(tmp_path / "g.safetensors", whole, **metadata)
  assert words in _refusal(lm, path)


def test_tensors_within_tensors(whole, lm, tmp_path):
  name = next(iter(whole[0]))
  more = {name + ".x": np.zeros(1, np.float32)}
  assert "within" in _refusal(lm, _write(tmp_path / "g", whole, more))
  wide = {name: whole[0][name].astype(np.float64)}
  assert "float64" in _refusal(lm, _write(tmp_path / "g", whole, wide))


def test_no_file_of_tensors(lm, tmp_path):
  path = tmp_path / "w.safetensors"
  for data in (b"", b"x" * 100, struct.pack("<Q", 1 << 60) + b"{}"):
    path.write_bytes(data)
    for load in (load_gistnet, load_lensnet):
      _refusal(lm, path, load)
  path.unlink()
  os.mkfifo(path)
  assert "regular file" in _refusal(lm, path)
  assert "regular file" in _refusal(lm, tmp_path)


def test_a_lensnet_of_other_sizes_is_refused(lm, tmp_path):
  from mcjax.lens import network, weights

  config = network.LensNetConfig(d_model=lm.config.d_model)
  params = network.init_params(config)
  other = network.LensNetConfig(d_model=lm.config.d_model, key_dim=32)
  path = tmp_path / "l.safetensors"
  weights.save_lensnet(path, params, other, {})
  assert "fit" in _refusal(lm, path, load_lensnet)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
  st.dictionaries(
    st.sampled_from(sorted(GistNetConfig.__dataclass_fields__)),
    st.integers() | st.floats() | st.text(max_size=3) | st.none()
    | st.booleans() | st.lists(st.integers(), max_size=2),
    min_size=1, max_size=2))
def test_fuzz_settings(whole, lm, tmp_path_factory, config):
  path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
  _write(path, whole, changes=config)
  try:
    load_gistnet(lm, path)
  except McjaxError as e:
    assert "\n" not in str(e)
