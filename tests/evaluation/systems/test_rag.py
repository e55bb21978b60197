"""The RAG baseline: the JAX encoder against PyTorch transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.evaluation.systems import rag


def _tiny(transformers):
  config = transformers.BertConfig(
    vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=64,
  )
  return transformers.BertModel(config, add_pooling_layer=False).eval()


def _write(folder, model):
  import json

  from safetensors import numpy as safetensors

  tensors = {k: v.numpy() for k, v in model.state_dict().items()}
  safetensors.save_file(tensors, folder / "model.safetensors")
  c = model.config
  (folder / "config.json").write_text(json.dumps({
    "num_hidden_layers": c.num_hidden_layers,
    "num_attention_heads": c.num_attention_heads,
    "layer_norm_eps": c.layer_norm_eps,
  }))


def _expected(torch, model, ids, present):
  with torch.no_grad():
    hidden = model(
      torch.from_numpy(ids.astype(np.int64)),
      attention_mask=torch.from_numpy(present.astype(np.int64)),
    ).last_hidden_state.numpy()
  pooled = (hidden * present[..., None]).sum(1) / present.sum(1)[:, None]
  return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def test_encoder_matches_pytorch(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  model = _tiny(transformers)
  _write(tmp_path, model)
  params, config = rag._load(tmp_path)
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 97, (3, 16)).astype(np.int32)
  present = np.arange(16)[None] < np.array([[16], [9], [4]])
  ours = rag.embed(params, config, jnp.asarray(ids), jnp.asarray(present))
  np.testing.assert_allclose(
    np.asarray(ours), _expected(torch, model, ids, present), atol=1e-5
  )


@pytest.mark.slow
def test_real_model_matches_pytorch():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = rag.fetch()
  model = transformers.BertModel.from_pretrained(
    folder, add_pooling_layer=False
  ).eval()
  embedder = rag.Embedder(folder, batch=2)
  texts = ["A harbour master keeps the log.", "def main(argv):\n  return 0"]
  ours = embedder.encode(texts)
  for text, vector in zip(texts, ours):
    pieces, _ = embedder.pieces(text)
    ids = np.array([[embedder._first, *pieces, embedder._last]])
    theirs = _expected(torch, model, ids, np.ones(ids.shape, bool))
    np.testing.assert_allclose(vector, theirs[0], atol=1e-4)


@pytest.mark.slow
def test_index_finds_the_passage():
  index = rag.Index(
    rag.Embedder(batch=4),
    "The pump house stands by the eastern quay.\n" * 30
    + "Trains to the mountains leave at nine in the morning.\n" * 30,
    chunk=60,
  )
  assert "Trains" in index.search("When does the train depart?", 1)[0]
  assert len(index.vectors) == len(index.chunks)


def test_slices_tile_the_text_at_line_ends():
  text = "abc\n" * 100
  cuts = list(rag._slices(text, size=30))
  assert "".join(text[a:b] for a, b in cuts) == text
  assert all(text[b - 1] == "\n" for _, b in cuts)
  assert list(rag._slices("x" * 70, size=30)) == [(0, 30), (30, 60), (60, 70)]
