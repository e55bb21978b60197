"""LoRA for reading gists: where it acts, and PEFT's files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mcjax.base import model
from mcjax.gist import encoder as gistnet
from mcjax.gist import lora
from mcjax.gist import weights as gist_weights
from mcjax.testing import tiny_base
from mcjax.types import McjaxError


def _noisy(tree, seed=0):
  rng = np.random.RandomState(seed)
  return jax.tree.map(
    lambda a: np.asarray(a) + rng.normal(0, 0.2, a.shape).astype(np.float32),
    tree)


def _encoder(lm, scope="gists"):
  """A GistNet of this base whose maps do something."""
  config = gist_weights.configure(
    lm.params, lm.config, {"lora_rank": 3, "lora_scope": scope})
  params = gist_weights.init_params(config)
  key = lora.SCOPES[scope]
  params["adapter"] = {**params["adapter"],
                       key: _noisy(params["adapter"][key])}
  return gistnet.GistEncoder(lm, params, config, trained=True)


def _hidden(lm, x, gists=None):
  places = jnp.arange(len(x), dtype=jnp.int32)
  return model.forward(lm.params, lm.config, x, places, gists=gists)[0]


@pytest.fixture(scope="module")
def lm():
  return tiny_base.make_lm()


@pytest.fixture(scope="module")
def x(lm):
  return model.embed(lm.params, jnp.arange(20, dtype=jnp.int32) % 11)


def test_maps_at_gists_leave_text_as_it_is_to_the_last_bit(lm, x):
  reader = _encoder(lm).reader(lm)
  rows = jnp.arange(20) >= 12
  plain, read = _hidden(lm, x), _hidden(reader, x, rows)
  np.testing.assert_array_equal(plain[:12], read[:12])
  assert np.abs(plain - read)[12:].max() > 1e-3
  np.testing.assert_array_equal(plain, _hidden(reader, x))


def test_maps_on_all_rows_equal_maps_where_all_rows_are_gists(lm, x):
  at_gists, everywhere = _encoder(lm), _encoder(lm, "all")
  here = at_gists.reader(lm)
  adapter = here.params["gist_adapter"]
  same = gistnet.GistEncoder(lm, {
    **everywhere.params, "adapter": {
      **everywhere.params["adapter"], "lora_all": adapter["lora"]}},
    everywhere.config, True).reader(lm)
  assert "lora_all" not in same.params["gist_adapter"]
  np.testing.assert_allclose(
    _hidden(here, x, jnp.ones(20, bool)), _hidden(same, x), atol=2e-5)


def test_a_peft_folder_is_what_was_saved(lm, tmp_path):
  encoder = _encoder(lm)
  lora.save(tmp_path, encoder.params["adapter"], "tiny")
  settings = json.loads((tmp_path / "adapter_config.json").read_text())
  assert settings["r"] == settings["lora_alpha"] == 3
  assert settings["base_model_name_or_path"] == "tiny"
  plain = gistnet.load_gistnet(lm)
  found = gistnet.load_gistnet(lm, lora=tmp_path)
  assert found.fingerprint == plain.fingerprint  # trees stay good
  assert found.config.lora_rank == 3 and found.config.lora_scope == "gists"
  jax.tree.map(np.testing.assert_array_equal,
               found.params["adapter"]["lora"],
               encoder.params["adapter"]["lora"])
  path = tmp_path / "gistnet.safetensors"
  gist_weights.save_gistnet(path, found.params, found.config, {})
  again = gistnet.load_gistnet(lm, path)
  assert again.config == found.config
  with pytest.raises(McjaxError, match="no LoRA"):
    lora.save(tmp_path, plain.params["adapter"], "tiny")


def test_a_folder_of_peft_acts_on_every_row_as_w_plus_b_a(lm, x, tmp_path):
  c, rng = lm.config, np.random.RandomState(1)
  a = rng.normal(0, 0.3, (2, c.d_model)).astype(np.float32)
  b = rng.normal(0, 0.3, (c.n_heads * c.head_dim, 2)).astype(np.float32)
  stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
  save_file({f"{stem}A.weight": a, f"{stem}B.weight": b},
            tmp_path / "adapter_model.safetensors")
  (tmp_path / "adapter_config.json").write_text(json.dumps(
    {"peft_type": "LORA", "r": 2, "lora_alpha": 4,
     "target_modules": ["q_proj"]}))
  reader = gistnet.load_gistnet(lm, lora=tmp_path).reader(lm)
  wq = np.array(lm.params["layers"]["wq"])
  wq[1] += 2 * (b @ a).T.reshape(wq[1].shape)
  plain = dataclasses.replace(lm, params={
    **lm.params, "layers": {**lm.params["layers"], "wq": jnp.asarray(wq)}})
  np.testing.assert_allclose(
    _hidden(reader, x), _hidden(plain, x), atol=1e-5)


def _change(key, value):
  def change(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
  return change


def _rename(folder):
  path = folder / "adapter_model.safetensors"
  tensors = load_file(path)
  name = min(tensors)
  tensors[name.replace("self_attn", "mlp")] = tensors.pop(name)
  save_file(tensors, path)


def _spoil(value):
  def change(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = value(tensors[name])
    save_file(tensors, path)
  return change


@pytest.mark.parametrize("change, said", [
  (_change("peft_type", "IA3"), "peft_type is not LORA"),
  (_change("r", 0), "r is 0"), (_change("r", "8"), "r is '8'"),
  (_change("lora_alpha", "x"), "lora_alpha is 'x'"),
  (_change("use_dora", True), "use_dora is not implemented"),
  (_change("mcjax_scope", "some"), "known: gists, all"),
  (_rename, "mlp.* is no map of the base's attention"),
  (_spoil(lambda a: a[:1]), "this base needs"),
  (_spoil(lambda a: a * np.float32(np.nan)), "NaN"),
  (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"),
   "not a safetensors file"),
  (lambda f: (f / "adapter_config.json").write_text("{"), "no PEFT adapter"),
])
def test_an_unusable_folder_is_refused_in_one_line(lm, tmp_path, change, said):
  lora.save(tmp_path, _encoder(lm).params["adapter"], "tiny")
  change(tmp_path)
  with pytest.raises(McjaxError, match=said) as error:
    gistnet.load_gistnet(lm, lora=tmp_path)
  assert "\n" not in str(error.value)
