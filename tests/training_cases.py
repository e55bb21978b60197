"""A tiny random base and a tiny text store for the training tests."""

import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base.decoder_config import DecoderConfig
from mcjax.base.load import BaseLM
from mcjax.gist import encoder as gistnet
from mcjax.testing import tiny_base
from mcjax.training.common import data

VOCAB = 64


@pytest.fixture(scope="session")
def lm():
  """The tiny base of all other tests, with a tokenizer."""
  return tiny_base.make_lm()


@pytest.fixture(scope="session")
def encoder(lm):
  """A GistNet of `lm`, away from its start."""
  return tiny_base.gistnet(lm, spread=0.05)


@pytest.fixture(scope="session")
def tiny_lm():
  """A random two-layer decoder with tied embeddings."""
  rng = np.random.default_rng(0)
  config = DecoderConfig(
    family="llama", vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4,
    n_kv_heads=2, head_dim=8, d_ff=48, max_positions=1024, rope_theta=1e4,
    rms_norm_eps=1e-5, tie_embeddings=True)

  def draw(*shape):
    return jnp.asarray(rng.normal(0, 0.3, shape).astype(np.float32))

  ones = jnp.ones((2, 32), jnp.float32)
  params = {
    "embed": draw(VOCAB, 32), "final_norm": ones[0],
    "layers": {
      "attn_norm": ones, "mlp_norm": ones, "wq": draw(2, 32, 4, 8),
      "wk": draw(2, 32, 2, 8), "wv": draw(2, 32, 2, 8),
      "wo": draw(2, 4, 8, 32), "w_gate": draw(2, 32, 48),
      "w_up": draw(2, 32, 48), "w_down": draw(2, 48, 32)}}
  return BaseLM("tiny", config, params, None, "tiny-base")


@pytest.fixture(scope="session")
def tiny_gist_config():
  """A GistNet of a few thousand parameters for `tiny_lm`."""
  return gistnet.GistNetConfig(
    d_model=32, width=16, heads=2, mlp_width=24, slot_parts=2,
    slot_mlp_width=16, copy_heads=2, levels=3, input_rms=0.3,
    adapter_layers=2)


@pytest.fixture(scope="session")
def tiny_stores(tmp_path_factory):
  """Two kinds of random documents, opened from disk."""
  folder = tmp_path_factory.mktemp("store")
  rng = np.random.default_rng(1)
  for kind, lengths in (("prose", (700, 400, 900)), ("code", (500, 1300))):
    data.write_kind(folder, "train", kind, [
      (f"{kind}-{i}", rng.integers(0, VOCAB, n))
      for i, n in enumerate(lengths)], VOCAB)
  return data.open_split(folder, "train")
