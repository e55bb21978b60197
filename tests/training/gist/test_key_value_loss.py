"""Gists that are keys and values: what they are made of, and their training."""

import dataclasses

import jax
import numpy as np
import pytest

from mcjax.gist import encoder as gistnet
from mcjax.gist import key_value, lora
from mcjax.parallel import sharding
from mcjax.training.gist import key_value_loss
from mcjax.training.gist import trainer as gist_trainer
from mcjax.training.gist.losses import Objective
from mcjax.types import McjaxError

_OBJECTIVE = Objective(window=128, segment=32, chunk=64, key_value=True)
_CONFIG = gist_trainer.TrainConfig(
  phases=(gist_trainer.Phase(4, _OBJECTIVE),), batch=2, micro_batch=1,
  warmup=1, learning_rate=0.0, adapter_rate=0.02, log_every=1, save_every=100,
  evaluate_every=4, validation_documents=2, mesh_data=1)


def _rows(seed, blocks=3):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, 2, 32 * blocks, 8)).astype(np.float32)


def test_without_queries_it_starts_as_the_mean_of_the_block():
  keys, values = _rows(0), _rows(1)
  found = key_value.write(key_value.init(2, (4, 2, 8)), keys, values)
  for got, rows in zip(found, (keys, values)):
    np.testing.assert_allclose(
      got, rows.reshape(2, 2, 3, 32, 8).mean(axis=3), atol=1e-6)
  np.testing.assert_allclose(found.bias, np.log(32), atol=1e-6)


def test_a_slot_answers_its_query_as_the_block_did():
  keys, values = _rows(0), _rows(1)
  queries = np.random.default_rng(3).normal(size=(2, 2, 8)).astype(np.float32)
  found = key_value.write(
    key_value.init(2, (4, 2, 8), queries), keys, values)
  logits = np.einsum("lkbsh,lkh->lkbs", keys.reshape(2, 2, 3, 32, 8),
                     queries) / np.sqrt(8)
  mass = np.log(np.exp(logits).sum(axis=-1))
  slot = np.einsum("lkbh,lkh->lkb", found.keys, queries) / np.sqrt(8)
  np.testing.assert_allclose(slot + found.bias, mass, atol=1e-5)
  weights = np.exp(logits - mass[..., None])
  np.testing.assert_allclose(
    found.values, np.einsum(
      "lkbs,lkbsh->lkbh", weights, values.reshape(2, 2, 3, 32, 8)), atol=1e-5)


def test_it_starts_at_the_mean_queries_of_the_text(
    tiny_lm, tiny_gist_config, tiny_stores):
  config = _with_writer(tiny_lm, tiny_gist_config)
  params = key_value_loss.started(tiny_lm, config, None, tiny_stores)
  pick = np.asarray(params["adapter"]["key_value"]["pick"])
  assert pick.shape == (2, tiny_lm.config.n_kv_heads, tiny_lm.config.head_dim)
  assert np.abs(pick).max() > 0
  again = key_value_loss.started(tiny_lm, config, params, tiny_stores, seed=1)
  assert again is params


def _with_writer(lm, config):
  return dataclasses.replace(
    config, adapter_layers=lm.config.n_layers, key_value=True,
    base_shape=lora.shape_of(lm.config))


def test_a_gist_depends_on_all_of_its_block_and_on_no_other():
  rng = np.random.default_rng(2)
  params = jax.tree.map(
    lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32),
    key_value.init(2, (4, 2, 8)))
  keys, values = _rows(0), _rows(1)
  before = key_value.write(params, keys, values)
  for token in range(32, 64):
    other = keys.copy()
    other[:, :, token] += 1
    for old, new in zip(before, key_value.write(params, other, values)):
      np.testing.assert_array_equal(old[:, :, ::2], new[:, :, ::2])
      assert np.abs(old - new)[:, :, 1].min() > 0


def test_training_moves_the_writer_alone_and_lowers_its_loss(
    tiny_lm, tiny_gist_config, tiny_stores, tmp_path):
  config = _with_writer(tiny_lm, tiny_gist_config)
  trainer = gist_trainer.GistTrainer(
    tiny_lm, config, _CONFIG, tiny_stores, tmp_path,
    mesh=sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
  before = jax.device_get(trainer.state["params"])
  batch = trainer._batch(0)
  losses = []
  for _ in range(4):
    trainer._ahead = trainer.step, batch  # the same windows, to be learned
    losses.append(trainer.one_step()["kl_key_value"])
  assert losses[-1] < losses[0]
  after = jax.device_get(trainer.state["params"])
  for name, stage in after.items():
    same = jax.tree.map(np.array_equal, before[name], stage)
    if name == "adapter":
      assert not any(jax.tree.leaves(same.pop("key_value")))
    assert all(jax.tree.leaves(same))
  found = trainer.evaluate(tiny_stores)["recovered"]
  assert found["key_value"]["n"] == found["gist"]["n"]
  trainer.export(tmp_path / "g.safetensors", {})
  encoder = gistnet.load_gistnet(tiny_lm, tmp_path / "g.safetensors")
  assert "key_value" in encoder.params["adapter"]
  assert "key_value" not in encoder.reader(tiny_lm).params["gist_adapter"]


@pytest.mark.parametrize("changes", [
  dict(sink=True), dict(foreign=True), dict(loop=True)])
def test_other_windows_are_refused(changes):
  with pytest.raises(McjaxError, match="key_value"):
    dataclasses.replace(_OBJECTIVE, **changes)
