"""GistNet: shape of the network, its start, its encoder and its files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import pretrained
from mcjax.base.decoder_config import DecoderConfig
from mcjax.base.load import BaseLM
from mcjax.gist import adapters
from mcjax.gist import encoder as gistnet
from mcjax.gist import weights as gist_weights
from mcjax.types import BRANCHING, McjaxError

_SMALL = gistnet.GistNetConfig(
  d_model=24, width=16, heads=2, mlp_width=24, slot_parts=2,
  slot_mlp_width=16, copy_heads=2, levels=3, input_rms=0.1)
_SMOLLM2 = DecoderConfig(
  family="llama", vocab_size=49152, d_model=576, n_layers=30, n_heads=9,
  n_kv_heads=3, head_dim=64, d_ff=1536, max_positions=8192, rope_theta=1e5,
  rms_norm_eps=1e-5, tie_embeddings=True)


_apply = jax.jit(gistnet.apply, static_argnums=1)


def _base(d_model=24, vocab=64, name="tiny"):
  rng = np.random.default_rng(0)
  config = dataclasses.replace(
    _SMOLLM2, vocab_size=vocab, d_model=d_model, n_layers=2, n_heads=2,
    n_kv_heads=1, head_dim=8, d_ff=32)

  def draw(*shape):
    return jnp.asarray(rng.normal(0, 0.2, shape).astype(np.float32))

  ones = jnp.ones((2, d_model), jnp.float32)
  params = {
    "embed": draw(vocab, d_model), "final_norm": ones[0],
    "layers": {
      "attn_norm": ones, "mlp_norm": ones, "wq": draw(2, d_model, 2, 8),
      "wk": draw(2, d_model, 1, 8), "wv": draw(2, d_model, 1, 8),
      "wo": draw(2, 2, 8, d_model), "w_gate": draw(2, d_model, 32),
      "w_up": draw(2, d_model, 32), "w_down": draw(2, 32, d_model)}}
  return BaseLM(name, config, params, None, "base")


def _trained(config=_SMALL, seed=3):
  """Parameters away from the zero start, so that every branch speaks."""
  params = gist_weights.init_params(config, seed)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  leaves = [a + jnp.asarray(rng.normal(0, 0.3, a.shape).astype(np.float32))
            for a in leaves]
  return jax.tree.unflatten(tree, leaves)


def _children(n=2, d=24, seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(0, 0.1, (n, BRANCHING, d)).astype(np.float32))


@pytest.mark.parametrize(
  "m", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_start_is_the_last_token_of_every_part(m):
  config = dataclasses.replace(_SMALL, slots_per_gist=m)
  x = _children()
  gists = _apply(gist_weights.init_params(config), config, x)
  part = BRANCHING // m
  np.testing.assert_array_equal(gists, x[:, part - 1 :: part])


def test_every_position_changes_the_gist():
  params, x = _trained(), _children(1)
  jacobian = jax.jit(jax.jacrev(lambda x: _apply(params, _SMALL, x)))(x)
  reach = np.abs(np.asarray(jacobian)).sum(axis=(0, 1, 2, 3, 5))
  assert reach.shape == (BRANCHING,)
  assert (reach > 1e-6).all()


def test_order_matters():
  params, x = _trained(), _children(1)
  swapped = x.at[0, 3].set(x[0, 4]).at[0, 4].set(x[0, 3])
  difference = _apply(params, _SMALL, x) - _apply(
    params, _SMALL, swapped)
  assert np.abs(difference).max() > 1e-5


def test_every_parameter_has_a_gradient():
  params, x = _trained(), _children(3)
  target = jnp.asarray(
    np.random.default_rng(5).normal(size=(3, 1, 24)).astype(np.float32))
  gradients = jax.jit(jax.grad(lambda p: jnp.sum(
    _apply(p, _SMALL, x) * target)))(params)
  for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_no_nan_at_any_input_scale(scale):
  params = _trained()

  @jax.jit
  @jax.value_and_grad
  def total(x):
    return jnp.sum(_apply(params, _SMALL, x))

  value, gradient = total(_children() * np.float32(scale))
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_scale_is_not_clamped():
  params = gist_weights.init_params(_SMALL)
  params["scale"] = jnp.full((1,), 100.0)
  x = _children()
  gists = _apply(params, _SMALL, x)
  np.testing.assert_allclose(gists[:, 0], 100 * x[:, -1], rtol=1e-6)


def test_clamped_norm_option():
  config = dataclasses.replace(_SMALL, clamp_norm=True)
  gists = np.asarray(_apply(_trained(config), config, _children()))
  rms = np.sqrt((gists**2).mean(axis=-1))
  np.testing.assert_allclose(rms, 0.1, rtol=1e-3)


def test_default_size_and_cost_are_within_the_bounds():
  config = gistnet.GistNetConfig(d_model=576)
  params = jax.eval_shape(lambda: gist_weights.init_params(config))
  layers = gistnet.params_per_layer(params)
  assert max(layers.values()) <= 500_000
  counted = gistnet.flops_per_token(config)
  assert counted < 0.005 * _SMOLLM2.flops_per_token


def test_an_adapter_counts_by_layers_of_the_base():
  config = dataclasses.replace(_SMALL, adapter_layers=5, adapter_rank=3)
  params = gist_weights.init_params(config)
  assert gistnet.params_per_layer(params)["adapter"] == 24 * (2 + 2 * 3)
  more = gistnet.flops_per_token(config) - gistnet.flops_per_token(_SMALL)
  assert more == 2 * 5 * 24 * (1 + 2 * 3) // BRANCHING


def test_flops_count_agrees_with_the_compiler():
  config = gistnet.GistNetConfig(d_model=576)
  params = jax.eval_shape(lambda: gist_weights.init_params(config))
  x = jax.ShapeDtypeStruct((16, BRANCHING, 576), jnp.float32)
  compiled = jax.jit(
    lambda p, x: _apply(p, config, x)).lower(params, x).compile()
  per_token = compiled.cost_analysis()["flops"] / (16 * BRANCHING)
  assert gistnet.flops_per_token(config) == pytest.approx(per_token, rel=0.05)


def test_batch_padding_does_not_change_a_gist():
  lm = _base()
  encoder = gistnet.GistEncoder(lm, _trained(), _SMALL, trained=True)
  ids = np.random.default_rng(0).integers(0, 64, (300, BRANCHING))
  whole = encoder.encode(ids)
  assert whole.shape == (300, 1, 24) and whole.dtype == np.float32
  one_by_one = np.concatenate([encoder.encode(ids[i : i + 1])
                               for i in (0, 17, 299)])
  np.testing.assert_allclose(whole[[0, 17, 299]], one_by_one, atol=2e-6)
  np.testing.assert_allclose(encoder.encode(ids[:20]), whole[:20], atol=2e-6)
  assert np.abs(whole).sum(axis=(1, 2)).min() > 0  # no zero vector anywhere


def test_batches_compile_once_per_size():
  encoder = gistnet.GistEncoder(_base(), _trained(), _SMALL, trained=True)
  for n in (1, 16, 256):
    encoder.encode_tokens(np.zeros((n, BRANCHING), np.int32))
    encoder.encode_gists(np.zeros((n, BRANCHING, 24), np.float32), 2)
  with jax.no_tracing():
    for n in (1, 2, 15, 16, 17, 256, 257, 600):
      encoder.encode_tokens(np.zeros((n, BRANCHING), np.int32))
      for level in (2, 3, 7):
        encoder.encode_gists(np.zeros((n, BRANCHING, 24), np.float32), level)


def test_nothing_to_encode():
  encoder = gistnet.GistEncoder(_base(), _trained(), _SMALL, trained=True)
  assert encoder.encode(np.zeros((0, BRANCHING), np.int32)).shape == (0, 1, 24)


@pytest.mark.parametrize("bad", [
  np.zeros((2, 31), int), np.zeros((32,), int), np.full((1, 32), 64),
  np.full((1, 32), -1)])
def test_incomplete_blocks_and_unknown_ids_are_refused(bad):
  encoder = gistnet.load_gistnet(_base())
  with pytest.raises(McjaxError):
    encoder.encode(bad)


def test_children_of_a_gist_must_be_complete():
  encoder = gistnet.load_gistnet(_base())
  with pytest.raises(McjaxError, match="32"):
    encoder.encode_gists(np.zeros((1, 31, 24), np.float32), 2)
  with pytest.raises(McjaxError, match="level"):
    encoder.encode_gists(np.zeros((1, 32, 24), np.float32), 1)


def test_per_level_weights():
  config = dataclasses.replace(_SMALL, per_level=True)
  params = gist_weights.init_params(config)
  params["scale"] = jnp.asarray([[1.0], [2.0], [3.0]])
  x = _children(1)
  for level, expected in ((1, 1.0), (2, 2.0), (3, 3.0), (9, 3.0)):
    gists = _apply(params, config, x, level)
    np.testing.assert_allclose(gists[:, 0], expected * x[:, -1], rtol=1e-6)


def test_hidden_state_features_follow_the_base():
  lm = _base()
  config = dataclasses.replace(_SMALL, input_layer=1)
  encoder = gistnet.GistEncoder(
    lm, gist_weights.init_params(config), config, trained=False)
  ids = np.arange(BRANCHING)[None]
  shallow = np.asarray(lm.params["embed"])[31]
  assert np.abs(encoder.encode(ids)[0, 0] - shallow).max() > 1e-3
  cost = gistnet.flops_per_token(config, lm.config)
  assert cost > gistnet.flops_per_token(_SMALL)


def test_several_vectors_per_gist_are_for_ablation_only():
  config = dataclasses.replace(_SMALL, slots_per_gist=2)
  encoder = gistnet.GistEncoder(
    _base(), gist_weights.init_params(config), config, trained=False)
  ids = np.zeros((3, BRANCHING), int)
  assert encoder.encode(ids).shape == (3, 2, 24)
  with pytest.raises(McjaxError, match="vectors per"):
    encoder.encode_tokens(ids)


def test_untrained_default_is_deterministic():
  first, second = (gistnet.load_gistnet(_base()) for _ in range(2))
  assert not first.trained
  assert first.fingerprint == second.fingerprint
  ids = np.arange(BRANCHING)[None]
  np.testing.assert_array_equal(
    first.encode_tokens(ids)[0], np.asarray(_base().params["embed"])[31])


def test_save_and_load(tmp_path):
  lm, params = _base(), _trained()
  path = tmp_path / "gistnet.safetensors"
  gist_weights.save_gistnet(path, params, _SMALL, {"steps": 7})
  loaded = gistnet.load_gistnet(lm, path)
  made = gistnet.GistEncoder(lm, params, _SMALL, trained=True)
  assert loaded.trained and loaded.card == {"steps": 7}
  assert loaded.fingerprint == made.fingerprint
  ids = np.arange(64).reshape(2, 32)
  np.testing.assert_array_equal(loaded.encode(ids), made.encode(ids))


@pytest.mark.parametrize("most, tolerance", [(0.1, 5e-4), (1e5, 0.0)])
def test_the_low_rank_map_is_stored_in_16_bits_where_they_hold_it(
    tmp_path, most, tolerance):
  config = dataclasses.replace(_SMALL, adapter_layers=2, adapter_rank=4)
  params = gist_weights.init_params(config)
  params["adapter"]["up"] = most * jax.random.uniform(
    jax.random.key(1), params["adapter"]["up"].shape)
  path = tmp_path / "gistnet.safetensors"
  gist_weights.save_gistnet(path, params, config, {})
  read = gist_weights.read_gistnet(path)[0]
  assert read["adapter"]["up"].dtype == jnp.float32
  np.testing.assert_allclose(
    read["adapter"]["up"], params["adapter"]["up"], rtol=tolerance, atol=1e-7)
  gist_weights.save_gistnet(path, read, config, {})
  jax.tree.map(np.testing.assert_array_equal, read,
               gist_weights.read_gistnet(path)[0])


def test_fingerprint_follows_the_weights():
  params = _trained()
  before = gist_weights.fingerprint(params, _SMALL)
  params["scale"] = params["scale"] + 1
  assert gist_weights.fingerprint(params, _SMALL) != before


def test_the_adapter_reads_gists_and_has_no_part_in_writing_them():
  lm, plain = _base(), _trained()
  config = dataclasses.replace(_SMALL, adapter_layers=2)
  params = {**plain, "adapter": {
    "gain": jnp.ones((2, 24)), "shift": jnp.ones((2, 24))}}
  with_one = gistnet.GistEncoder(lm, params, config, trained=True)
  without = gistnet.GistEncoder(lm, plain, _SMALL, trained=True)
  assert with_one.fingerprint == without.fingerprint
  ids = np.arange(64).reshape(2, 32)
  np.testing.assert_array_equal(with_one.encode(ids), without.encode(ids))
  assert without.reader(lm) is lm
  reader = with_one.reader(lm)
  assert reader.params["gist_adapter"] is params["adapter"]
  assert reader.params["layers"] is lm.params["layers"]
  with pytest.raises(McjaxError, match="adapts 5 layers"):
    gistnet.GistEncoder(lm, params, dataclasses.replace(
      config, adapter_layers=5), trained=True)


def test_training_on_adds_what_the_trained_weights_lack(tmp_path):
  path, trained, lm = tmp_path / "gistnet.safetensors", _trained(), _base()
  old = {"steps": 7, "gist_attention": "masked"}
  gist_weights.save_gistnet(path, trained, _SMALL, old)
  params, config, card = gist_weights.start(lm, {"adapter_layers": 2}, path)
  assert card == {"gist_attention": "masked", "initial_run": old}
  assert config == dataclasses.replace(_SMALL, adapter_layers=2)
  jax.tree.map(np.testing.assert_array_equal,
               adapters.without_adapter(params), trained)
  assert params["adapter"]["gain"].shape == (2, 24)
  assert not np.asarray(params["adapter"]["gain"]).any()
  gist_weights.save_gistnet(path, params, config, {})
  wider, _, _ = gist_weights.start(lm, {"adapter_rank": 3}, path)
  assert wider["adapter"]["down"].shape == (2, 24, 3)
  assert not np.asarray(wider["adapter"]["up"]).any()
  with pytest.raises(McjaxError, match="copy_gain does not fit"):
    gist_weights.start(lm, {"copy_heads": 3}, path)
  with pytest.raises(McjaxError, match="config.gistnet.depth"):
    gist_weights.start(lm, {"depth": 3}, path)
  params, config, card = gist_weights.start(lm, {"width": 12, "heads": 2})
  assert params is None and config.width == 12 and card == {}


def test_shipped_weights_are_found_by_the_base_name(tmp_path, monkeypatch):
  folder = tmp_path / "pretrained" / "tiny"
  gist_weights.save_gistnet(
    folder / "gistnet.safetensors", _trained(), _SMALL, {})
  monkeypatch.setattr(pretrained, "_ROOT", tmp_path / "pretrained")
  assert gistnet.load_gistnet(_base()).trained
  assert not gistnet.load_gistnet(_base(name="other")).trained
  assert not gistnet.load_gistnet(_base(d_model=32)).trained


def test_unusable_files_are_refused(tmp_path):
  lm = _base()
  with pytest.raises(McjaxError, match="no gistnet weights"):
    gistnet.load_gistnet(lm, tmp_path / "missing.safetensors")
  broken = tmp_path / "broken.safetensors"
  broken.write_bytes(b"not a safetensors file")
  with pytest.raises(McjaxError, match="not a safetensors"):
    gistnet.load_gistnet(lm, broken)
  other = tmp_path / "other.safetensors"
  pretrained.save_weights(other, "lensnet", {"a": np.zeros(2)}, {}, {})
  with pytest.raises(McjaxError, match="no gistnet"):
    gistnet.load_gistnet(lm, other)
  wide = tmp_path / "wide.safetensors"
  gist_weights.save_gistnet(wide, _trained(), _SMALL, {})
  with pytest.raises(McjaxError, match="24"):
    gistnet.load_gistnet(_base(d_model=32), wide)
  unfit = tmp_path / "unfit.safetensors"
  fields = dataclasses.asdict(_SMALL) | {"width": 32}
  pretrained.save_weights(unfit, "gistnet", _trained(), fields, {})
  with pytest.raises(McjaxError, match="do not fit"):
    gistnet.load_gistnet(lm, unfit)


@pytest.mark.parametrize("field, value", [
  ("width", 0), ("heads", 5), ("slots_per_gist", 3), ("input_rms", 0.0)])
def test_configuration_errors_name_the_field(field, value):
  with pytest.raises(McjaxError, match=field):
    dataclasses.replace(_SMALL, **{field: value})


def test_shipped_weights_open():
  """Every released weights file opens and carries its card."""
  for path in sorted(pretrained._ROOT.glob("*/gistnet.safetensors")):
    params, config, card = gist_weights.read_gistnet(path)
    assert config.slots_per_gist == 1
    assert card["steps"] > 0 and json.dumps(card)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(params))


_TABLE = {"gists_seen": {"1024": 4, "512": 8}}


@pytest.mark.parametrize("trained, card, window, expected", [
  (True, {}, 512, None), (True, {"gist_attention": "visible"}, 512, None),
  (True, {"gist_attention": "masked"}, 512, 0), (False, {}, 512, 0),
  (True, _TABLE, 256, 8), (True, _TABLE, 512, 8), (True, _TABLE, 544, 4),
  (True, _TABLE, 2048, 0), (False, _TABLE, 256, 0)])
def test_the_card_says_how_many_gists_to_attend_to(
    trained, card, window, expected):
  encoder = gistnet.GistEncoder(
    _base(), gist_weights.init_params(_SMALL), _SMALL, trained, card)
  assert encoder.gists_seen(window) == expected


def test_shipped_weights_load_and_are_small():
  path = pretrained.shipped("smollm2-135m", "gistnet")
  params, config, card = gist_weights.read_gistnet(path)
  assert config.d_model == 576 and path.stat().st_size < 12e6
  assert card["base"] == "smollm2-135m" and card["steps"] > 0
  assert card["gist_attention"] in ("visible", "masked")
  assert max(gistnet.params_per_layer(params).values()) <= 500_000
  share = (gistnet.flops_per_token(config, _SMOLLM2)
           / _SMOLLM2.flops_per_token)
  assert share < 0.005
