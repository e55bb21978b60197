"""Folders and GGUF files: equal results, and clear words for damaged ones."""

import json
import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest

from mcjax.base import hub
from mcjax.base.load import load_base_lm
from mcjax.parallel import sharding
from mcjax.testing import tiny_models
from mcjax.types import McjaxError


def _assert_same(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _folder(path, case="llama", shards=1, **changes):
  config = tiny_models.CONFIGS[case]
  tensors = {**tiny_models.weights(config), **changes}
  tensors = {k: v for k, v in tensors.items() if v is not None}
  return tiny_models.write_folder(path, config, tensors, shards)


def _gguf(path, case="llama", **options):
  config = tiny_models.CONFIGS[case]
  tensors = tiny_models.weights(config)
  return tiny_models.write_gguf(path, config, tensors, **options)


def _refusal(source) -> str:
  with pytest.raises(McjaxError) as caught:
    load_base_lm(source)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_shards_equal_one_file(tmp_path):
  one = load_base_lm(_folder(tmp_path / "one"))
  many = load_base_lm(_folder(tmp_path / "many", shards=3))
  _assert_same(one.params, many.params)
  assert one.fingerprint == many.fingerprint
  assert one.name == "one" and many.name == "many"


@pytest.mark.parametrize(
  "case", ["llama", "llama_tied_biased", "qwen2", "qwen3", "smollm3",
           "llama_linear", "qwen2_yarn", "gemma3_six", "phi3", "phi4_mini",
           "olmo2", "granite"]
)
def test_gguf_equals_folder(case, tmp_path):
  """Also proves llama.cpp's q/k permutation undone where it was applied."""
  folder = load_base_lm(_folder(tmp_path / "m", case))
  file = load_base_lm(_gguf(tmp_path / "m.gguf", case))
  assert file.config == folder.config
  _assert_same(file.params, folder.params)
  assert file.fingerprint == folder.fingerprint
  assert file.tokenizer.stop_ids == folder.tokenizer.stop_ids


@pytest.mark.parametrize("case", ["gemma3_six", "phi3", "olmo2", "granite"])
def test_each_family_is_read_into_shards(case, tmp_path):
  """Constants and shared tensors too, device by device."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  path = _folder(tmp_path / "m", case)
  whole, split = load_base_lm(path), load_base_lm(path, mesh=mesh)
  _assert_same(whole.params, split.params)
  assert whole.fingerprint == split.fingerprint


def test_gguf_dequantises(tmp_path):
  exact = load_base_lm(_gguf(tmp_path / "a.gguf"))
  coarse = load_base_lm(_gguf(tmp_path / "b.gguf", quantised=True))
  a = np.asarray(exact.params["layers"]["wq"])
  b = np.asarray(coarse.params["layers"]["wq"])
  assert 0 < np.abs(a - b).max() < 0.02 * np.abs(a).max()
  assert exact.fingerprint != coarse.fingerprint


def test_gguf_recovers_llama3_rope_from_its_divisors(tmp_path):
  """The tensor as convert_hf_to_gguf.py computes it, one frequency a time."""
  theta, h, factor = 10000.0, 16, 32.0
  divisors = []
  for i in range(0, h, 2):
    wavelength = 2 * np.pi * theta ** (i / h)
    if wavelength < 8192 / 4:
      divisors.append(1)
    elif wavelength > 8192:
      divisors.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / 3
      divisors.append(1 / ((1 - smooth) / factor + smooth))
  freqs = np.array(divisors)
  lm = load_base_lm(_gguf(tmp_path / "m.gguf", rope_freqs=freqs))
  scaling = lm.config.rope_scaling
  assert scaling.factor == factor and scaling.original_max_positions == 8192
  odd = _gguf(tmp_path / "odd.gguf", rope_freqs=freqs**0.5)
  assert "rope_freqs.weight" in _refusal(odd)


@pytest.mark.parametrize(
  "extra, words",
  [
    ({"llama.expert_count": 8}, "llama.expert_count=8"),
    ({"llama.rope.scaling.type": "ntk"}, "llama.rope.scaling.type='ntk'"),
    ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8"),
    ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window=8"),
    ({"split.count": 2}, "split.count=2"),
  ],
)
def test_gguf_refusals(extra, words, tmp_path):
  assert words in _refusal(_gguf(tmp_path / "m.gguf", extra=extra))


def test_gguf_refuses_other_architectures(tmp_path):
  config = {**tiny_models.CONFIGS["llama"], "model_type": "gemma2"}
  path = tiny_models.write_gguf(tmp_path / "m.gguf", config, {})
  assert "general.architecture='gemma2'" in _refusal(path)


def test_gguf_missing_tensor_and_damage(tmp_path):
  lacking = _gguf(tmp_path / "a.gguf", skip=("blk.2.ffn_up.weight",))
  assert "'blk.2.ffn_up.weight'" in _refusal(lacking)
  whole = _gguf(tmp_path / "b.gguf").read_bytes()
  for size in (0, 3, 100, 5000, len(whole) // 2, len(whole) - 1000):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:size])
    assert "not a whole GGUF file" in _refusal(cut)
  cut.write_bytes(b"GARBAGE!" * 1000)
  assert "not a whole GGUF file" in _refusal(cut)


def test_every_quantisation_that_gguf_offers_is_readable():
  """llama.cpp's common file types, on one block of zeros each."""
  types = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS BF16"
  for name in types.split():
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = gguf.quants.dequantize(np.zeros((2, size), np.uint8), kind)
    assert out.shape == (2, block)


def test_damaged_folders(tmp_path):
  up = "model.layers.1.mlp.up_proj.weight"
  assert repr(up) in _refusal(_folder(tmp_path / "a", **{up: None}))
  odd = np.zeros((3, 64), np.float32)
  text = _refusal(_folder(tmp_path / "b", **{up: odd}))
  assert "(3, 64)" in text and "(96, 64)" in text
  bias = {"model.layers.1.self_attn.q_proj.bias": np.zeros(64, np.float32)}
  assert "q_proj.bias" in _refusal(_folder(tmp_path / "c", **bias))
  int8 = {up: np.zeros((96, 64), np.int8)}
  assert "I8" in _refusal(_folder(tmp_path / "d", **int8))

  folder = _folder(tmp_path / "e")
  file = folder / "model.safetensors"
  whole = file.read_bytes()
  for content in (whole[:-100], whole[:50], b""):
    file.write_bytes(content)
    assert "model.safetensors is damaged" in _refusal(folder)
  file.unlink()
  assert "model.safetensors" in _refusal(folder)
  (folder / "config.json").write_text("{")
  assert "config.json is not JSON" in _refusal(folder)
  (folder / "config.json").unlink()
  assert "config.json" in _refusal(folder)

  sharded = _folder(tmp_path / "f", shards=2)
  (sharded / "model-00002-of-00002.safetensors").unlink()
  assert "model-00002-of-00002.safetensors is missing" in _refusal(sharded)
  index = sharded / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": []}))
  assert "weight_map" in _refusal(sharded)


def test_damaged_tokenizers(tmp_path):
  folder = _folder(tmp_path / "m")
  (folder / "tokenizer.json").write_text('{"model": 3}')
  assert "tokenizer.json is damaged" in _refusal(folder)
  (folder / "tokenizer.json").unlink()
  assert "no tokenizer.json" in _refusal(folder)


def test_unknown_sources(tmp_path):
  assert "smollm2-135m" in _refusal("smollm2-136m")
  assert "no-such.gguf" in _refusal(tmp_path / "no-such.gguf")
  (tmp_path / "text.txt").write_text("x")
  assert "neither a folder nor a .gguf" in _refusal(tmp_path / "text.txt")
  with pytest.raises(McjaxError, match="dtype"):
    load_base_lm("smollm2-135m", dtype="float16")


def test_hugging_face_id(tmp_path, monkeypatch):
  huggingface_hub = pytest.importorskip("huggingface_hub")
  folder = _folder(tmp_path / "snapshot")

  def download(repo, **kwargs):
    if repo == "owner/model":
      return str(folder)
    raise ConnectionError("no route\nto host")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert load_base_lm("owner/model").config.d_model == 64
  assert "cannot download 'owner/other'" in _refusal("owner/other")
  local = tmp_path / "owner" / "other"
  _folder(local)
  monkeypatch.chdir(tmp_path)
  assert load_base_lm("owner/other").config.d_model == 64


def test_fingerprint_tells_models_apart(tmp_path):
  base = load_base_lm(_folder(tmp_path / "a")).fingerprint
  up = "model.layers.1.mlp.up_proj.weight"
  config = tiny_models.CONFIGS["llama"]
  other = {up: tiny_models.weights(config)[up] * np.float32(1.001)}
  assert load_base_lm(_folder(tmp_path / "b", **other)).fingerprint != base
  folder = _folder(tmp_path / "c")
  text = (folder / "tokenizer.json").read_text()
  (folder / "tokenizer.json").write_text(text.replace("spare", "other"))
  assert load_base_lm(folder).fingerprint != base
  assert load_base_lm(_folder(tmp_path / "d")).fingerprint == base


def test_no_pytorch_at_run_time():
  """Loading and chatting imports neither PyTorch nor transformers."""
  code = (
    "import sys; from mcjax.base.load import load_base_lm\n"
    "lm = load_base_lm('smollm2-135m')\n"
    "lm.tokenizer.chat_turn('Hello', True)\n"
    "print([m for m in ('torch', 'transformers') if m in sys.modules])"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert run.stdout.strip() == "[]"


def test_smollm2(smollm2):
  c = smollm2.config
  assert (c.n_layers, c.d_model, c.n_heads, c.n_kv_heads) == (30, 576, 9, 3)
  assert c.max_positions == 8192 and c.rope_theta == 1e5 and c.tie_embeddings
  assert smollm2.params["embed"].shape == (49152, 576)
  assert smollm2.name in hub.NAMED_MODELS
