"""Loads a frozen base LM from Hugging Face files or a GGUF file.

Tensors are read one by one into the stacked layout of `model.py`, so that the
peak is about the size of the final parameters plus one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np

from mcjax.base import hub
from mcjax.base.config import decoder_config_from_gguf, decoder_config_from_hf
from mcjax.base.layout import (
  Leaf,
  Tensors,
  aligned_empty,
  leaves_of,
  read_params,
)
from mcjax.base.model import DecoderConfig
from mcjax.base.tokenizer import Tokenizer
from mcjax.types import McjaxError

_DTYPES = ("float32", "bfloat16")
_CHUNK = 1 << 22  # values dequantised at a time


@dataclasses.dataclass(frozen=True, eq=False)
class BaseLM:
  """A frozen base LM.

  Attributes:
    name: the source as given, without its folders.
    config: sizes and switches, a jit static.
    params: parameter pytree of `model.py`, jax arrays.
    tokenizer: its tokenizer.
    fingerprint: hex digest of architecture, weights and vocabulary; it does
      not depend on `dtype`. Saved trees name their base LM by it.
  """

  name: str
  config: DecoderConfig
  params: dict
  tokenizer: Tokenizer
  fingerprint: str


def load_base_lm(
  source: str | os.PathLike, *, dtype: str = "float32"
) -> BaseLM:
  """Loads a frozen base LM.

  Args:
    source: a name of `hub.NAMED_MODELS` ("smollm2-135m"), a Hugging Face
      folder (config.json, safetensors, tokenizer.json), a Hugging Face id
      ("owner/model", downloaded), or the path of a .gguf file.
    dtype: of all parameters, "float32" or "bfloat16".

  Returns:
    The base LM, its parameters on the default device.

  Raises:
    McjaxError: the source is unknown, missing, damaged, or a model that the
      decoder does not implement.
  """
  if dtype not in _DTYPES:
    raise McjaxError(f"dtype must be one of {_DTYPES}, got {dtype!r}")
  path = _resolve(os.fspath(source))
  name = os.path.basename(os.fspath(source).rstrip("/\\")) or str(source)
  try:
    opened = _open_folder(path) if path.is_dir() else _open_gguf(path)
    with opened as (config, tensors, leaves, tokenizer):
      params, digest = read_params(
        config, tensors, leaves, np.dtype(jnp.dtype(dtype))
      )
  except McjaxError as e:
    raise McjaxError(f"{path}: {e}") from e
  if tokenizer.largest_text_id() >= config.vocab_size:
    raise McjaxError(
      f"{path}: the tokenizer has ids up to {tokenizer.largest_text_id()}, the "
      f"embedding only {config.vocab_size} rows"
    )
  digest.update(tokenizer.vocabulary_digest())
  return BaseLM(name, config, params, tokenizer, digest.hexdigest())


def _resolve(source: str) -> pathlib.Path:
  """Folder or GGUF file of a source, downloaded if need be."""
  if source in hub.NAMED_MODELS:
    return hub.fetch(source)
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    return path
  if path.is_file():
    if path.suffix == ".gguf":
      return path
    raise McjaxError(f"{path} is neither a folder nor a .gguf file")
  if path.suffix == ".gguf" or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
    raise McjaxError(
      f"no base LM {source!r}: not a file or folder, not a Hugging Face id "
      f"(owner/model), and not one of {', '.join(hub.NAMED_MODELS)}"
    )
  return hub.fetch_hugging_face(source)


# --- Hugging Face folders ----------------------------------------------------


@contextlib.contextmanager
def _open_folder(path: pathlib.Path) -> Iterator[tuple]:
  config = decoder_config_from_hf(read_json(path / "config.json"))
  tokenizer = Tokenizer.from_folder(path)
  with contextlib.ExitStack() as stack:
    tensors = _safetensors(path, stack)
    yield config, tensors, _hf_leaves(config), tokenizer


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Parses a JSON object; McjaxError if it is missing or malformed."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e:
    raise McjaxError(f"cannot read {path.name}: {e.strerror}") from e
  except ValueError as e:
    raise McjaxError(f"{path.name} is not JSON: {e}") from e
  if not isinstance(value, dict):
    raise McjaxError(f"{path.name} holds no JSON object")
  return value


def _safetensors(path: pathlib.Path, stack: contextlib.ExitStack) -> Tensors:
  """Opens model.safetensors, or the shards that its index names."""
  import safetensors

  if (path / "model.safetensors").is_file():
    files = ["model.safetensors"]
  elif (path / "model.safetensors.index.json").is_file():
    index = read_json(path / "model.safetensors.index.json").get("weight_map")
    if not isinstance(index, dict) or not index:
      raise McjaxError("model.safetensors.index.json has no 'weight_map'")
    files = sorted({os.path.basename(str(name)) for name in index.values()})
  else:
    raise McjaxError("no model.safetensors and no model.safetensors.index.json")
  owner, shapes = {}, {}
  for file in files:
    if not (path / file).is_file():
      raise McjaxError(f"{file} is missing")
    try:
      opened = safetensors.safe_open(path / file, framework="numpy")
      handle = stack.enter_context(opened)
      for key in handle.keys():
        piece = handle.get_slice(key)
        if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
          raise McjaxError(f"{key!r} in {file} is {piece.get_dtype()}")
        owner[key], shapes[key] = handle, tuple(piece.get_shape())
    except (safetensors.SafetensorError, OSError) as e:
      raise McjaxError(f"{file} is damaged: {e}") from e
  return Tensors(shapes, lambda name: owner[name].get_tensor(name))


def _hf_leaves(config: DecoderConfig) -> dict[str, Leaf]:
  """Parameter path -> leaf, `{i}` standing for the layer."""
  layer = "model.layers.{i}."
  names = dict(
    attn_norm="input_layernorm.weight",
    mlp_norm="post_attention_layernorm.weight",
    wq="self_attn.q_proj.weight",
    wk="self_attn.k_proj.weight",
    wv="self_attn.v_proj.weight",
    wo="self_attn.o_proj.weight",
    w_gate="mlp.gate_proj.weight",
    w_up="mlp.up_proj.weight",
    w_down="mlp.down_proj.weight",
    bq="self_attn.q_proj.bias",
    bk="self_attn.k_proj.bias",
    bv="self_attn.v_proj.bias",
    bo="self_attn.o_proj.bias",
    q_norm="self_attn.q_norm.weight",
    k_norm="self_attn.k_norm.weight",
  )
  names = {key: layer + name for key, name in names.items()}
  names.update(
    embed="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    unembed="lm_head.weight",
  )
  return leaves_of(config, names, permuted=False)


# --- GGUF --------------------------------------------------------------------


@contextlib.contextmanager
def _open_gguf(path: pathlib.Path) -> Iterator[tuple]:
  import gguf

  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError, OSError, struct.error) as e:
    raise McjaxError(f"not a whole GGUF file: {e}") from e
  config = decoder_config_from_gguf(reader)
  stored = {t.name: t for t in reader.tensors}
  shapes = {n: tuple(int(d) for d in t.shape[::-1]) for n, t in stored.items()}

  def read(name: str) -> np.ndarray:
    tensor = stored[name]
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    out = aligned_empty((len(rows), shapes[name][-1]), np.float32)
    step = max(1, _CHUNK // out.shape[1])
    try:
      for i in range(0, len(out), step):
        out[i : i + step] = gguf.quants.dequantize(
          rows[i : i + step], tensor.tensor_type
        )
    except NotImplementedError as e:
      raise McjaxError(
        f"{name!r} is quantised as {tensor.tensor_type.name}, which the gguf "
        "package cannot read"
      ) from e
    return out.reshape(shapes[name])

  tokenizer = Tokenizer.from_gguf(reader)
  reader.fields.clear()  # a view per token of the vocabulary
  yield config, Tensors(shapes, read), _gguf_leaves(config), tokenizer


def _gguf_leaves(config: DecoderConfig) -> dict[str, Leaf]:
  names = dict(
    attn_norm="attn_norm.weight",
    mlp_norm="ffn_norm.weight",
    wq="attn_q.weight",
    wk="attn_k.weight",
    wv="attn_v.weight",
    wo="attn_output.weight",
    w_gate="ffn_gate.weight",
    w_up="ffn_up.weight",
    w_down="ffn_down.weight",
    bq="attn_q.bias",
    bk="attn_k.bias",
    bv="attn_v.bias",
    bo="attn_output.bias",
    q_norm="attn_q_norm.weight",
    k_norm="attn_k_norm.weight",
  )
  names = {key: "blk.{i}." + name for key, name in names.items()}
  names.update(
    embed="token_embd.weight",
    final_norm="output_norm.weight",
    unembed="output.weight",
  )
  return leaves_of(
    config, names, permuted=config.family in ("llama", "smollm3")
  )
