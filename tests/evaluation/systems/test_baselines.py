"""Baselines: the same tokens as the plain model, the right cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import model
from mcjax.evaluation.systems import baselines


@pytest.fixture(scope="module")
def ids():
  return np.random.default_rng(0).integers(0, 200, 150).astype(np.int32)


@pytest.mark.parametrize(
  "chunk", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_prefill_is_full_attention(tiny_lm, ids, chunk, monkeypatch):
  monkeypatch.setattr(baselines, "_PREFIX", 32)
  expected = np.asarray(model.logits(tiny_lm.params, tiny_lm.config, ids))[-1]
  cache = baselines.empty_cache(tiny_lm.config, 192, jnp.float32)
  _, logits = baselines.prefill(tiny_lm, ids, cache, chunk)
  np.testing.assert_allclose(np.asarray(logits), expected, atol=2e-5)


@pytest.mark.parametrize("unstacked", [False, True])
def test_decoding_is_greedy(tiny_lm, ids, unstacked):
  c = tiny_lm.config
  params = tiny_lm.params
  if unstacked:
    params = {**params, "layers": tuple(
      jax.tree.map(lambda a, i=i: a[i], params["layers"])
      for i in range(c.n_layers)
    )}
  cache = baselines.empty_cache(c, 192, jnp.float32)
  cache, logits = baselines.prefill(tiny_lm, ids, cache, 64)
  cache, tokens, logits = baselines.decode_block(
    params, c, cache, np.int32(150), logits, 8
  )
  text = list(ids)
  for token in np.asarray(tokens).tolist():
    plain = model.logits(tiny_lm.params, c, np.array(text, np.int32))
    assert int(jnp.argmax(plain[-1])) == token
    text.append(token)
  plain = model.logits(tiny_lm.params, c, np.array(text, np.int32))
  np.testing.assert_allclose(
    np.asarray(logits), np.asarray(plain[-1]), atol=2e-5
  )


def test_decoding_again_starts_at_the_same_place(tiny_lm, ids):
  plain = baselines.PlainDecoder(tiny_lm, ids[:128], block=8)
  assert plain.decode(2) > 0
  assert plain._cache.keys[0].shape[1] == 128


def test_unstacked_layers_are_the_same_layers(tiny_lm):
  params = model.unstacked(tiny_lm.params)
  assert isinstance(params["layers"], tuple)
  for i, layer in enumerate(params["layers"]):
    for key, value in layer.items():
      np.testing.assert_array_equal(value, tiny_lm.params["layers"][key][i])


def test_pytorch_has_the_same_weights(tiny_lm, ids):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  # Not the angles that PyTorch takes by default.
  lm = dataclasses.replace(
    tiny_lm, config=dataclasses.replace(tiny_lm.config, rope_theta=500.0))
  try:
    torch = baselines.TorchDecoder(lm)
  except baselines.McjaxError as error:
    pytest.skip(str(error))
  expected = np.asarray(model.logits(lm.params, lm.config, ids))[-1]
  np.testing.assert_allclose(torch.prefill(ids), expected, atol=2e-5)
  assert torch.decode(2) > 0
