"""GistNet that reads the blocks before: which ones, and only in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import pretrained
from mcjax.gist import encoder as gistnet
from mcjax.gist import weights as gist_weights
from mcjax.types import BRANCHING, McjaxError

_PLAIN = gistnet.GistNetConfig(
  d_model=64, width=16, heads=2, mlp_width=24, slot_parts=2,
  slot_mlp_width=16, copy_heads=2, levels=3, input_rms=0.1)
_CONFIG = dataclasses.replace(_PLAIN, context_blocks=2)
_apply = jax.jit(gistnet.apply, static_argnums=(1, 4))


def _trained():
  """Parameters away from the zero start, so that every branch speaks."""
  leaves, tree = jax.tree.flatten(gist_weights.init_params(_CONFIG, 3))
  rng = np.random.default_rng(3)
  return jax.tree.unflatten(tree, [
    a + jnp.asarray(rng.normal(0, 0.3, a.shape).astype(np.float32))
    for a in leaves])


def _children(n):
  rng = np.random.default_rng(1)
  return rng.normal(0, 0.1, (n, BRANCHING, 64)).astype(np.float32)


def _changed(run, level=1):
  """Which of six gists change with block 1."""
  params, x = _trained(), _children(6)
  other = x.copy()
  other[1] += 0.1
  before, after = (
    np.asarray(_apply(params, _CONFIG, a, level, run)) for a in (x, other))
  return np.flatnonzero(np.abs(before - after).max(axis=(1, 2)) > 1e-6).tolist()


def test_a_gist_reads_the_blocks_before_it_and_no_others():
  assert _changed(run=None) == [1, 2, 3]


def test_texts_of_one_batch_do_not_mix():
  assert _changed(run=2) == [1]
  assert _changed(run=3) == [1, 2]


def test_gists_of_gists_read_their_children_alone():
  assert _changed(run=None, level=2) == [1]


def test_it_starts_as_the_network_without():
  fresh = gist_weights.init_params(_CONFIG, 5)
  rest = {k: v for k, v in fresh.items() if not k.startswith("context")}
  x = _children(4)
  np.testing.assert_allclose(
    _apply(fresh, _CONFIG, x, 1, None), _apply(rest, _PLAIN, x, 1, None),
    atol=1e-6)


def test_the_encoder_writes_text_by_text_and_a_history_refuses_it(tiny_lm):
  config = gist_weights.default_config(
    tiny_lm.params, tiny_lm.config, context_blocks=2)
  params = gist_weights.init_params(config)
  kernel = params["context"]["wo"]
  params["context"]["wo"] = jnp.ones_like(kernel) * 0.1
  encoder = gistnet.GistEncoder(tiny_lm, params, config, trained=True)
  ids = np.random.default_rng(0).integers(0, 200, (6, BRANCHING))
  whole = encoder.encode(ids, run=3)
  np.testing.assert_allclose(whole[:3], encoder.encode(ids[:3], run=3),
                             atol=1e-6)
  assert encoder.encode(ids[:0]).shape == (0, 1, config.d_model)
  with pytest.raises(McjaxError, match="context_blocks"):
    encoder.encode_tokens(ids)


def test_a_network_without_is_told_as_before_there_was_such_a_field():
  params = gist_weights.init_params(_PLAIN)
  fields = {k: v for k, v in dataclasses.asdict(_PLAIN).items()
            if not k.startswith(
              ("adapter_", "lora_", "key_value", "base_shape", "context_"))}
  assert gist_weights.fingerprint(params, _PLAIN) == pretrained.fingerprint(
    params, fields)
  assert gist_weights.fingerprint(params, _PLAIN) != gist_weights.fingerprint(
    params, _CONFIG)


def test_its_operations_are_counted():
  sizes = dict(d_model=576)
  plain = gistnet.GistNetConfig(**sizes)
  context = gistnet.GistNetConfig(**sizes, context_blocks=8)

  def compiled(config):
    params = jax.eval_shape(lambda: gist_weights.init_params(config))
    x = jax.ShapeDtypeStruct((16, BRANCHING, 576), jnp.float32)
    return jax.jit(lambda p, x: gistnet.apply(p, config, x)).lower(
      params, x).compile().cost_analysis()["flops"] / (16 * BRANCHING)

  more = gistnet.flops_per_token(context) - gistnet.flops_per_token(plain)
  assert more == pytest.approx(compiled(context) - compiled(plain), rel=0.1)
