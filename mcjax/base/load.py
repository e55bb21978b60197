"""Loads a frozen base LM from Hugging Face files or a GGUF file.

Tensors are read one by one into the stacked layout of `model.py`, so that the
peak is about the size of the final parameters plus two tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.base import files, hub
from mcjax.base.compilation_cache import keep_programs
from mcjax.base.config import Folds, decoder_config_from_hf, folds_from_hf
from mcjax.base.decoder_config import DecoderConfig
from mcjax.base.gguf_config import decoder_config_from_gguf, folds_from_gguf
from mcjax.base.gguf_file import GgufFile
from mcjax.base.layout import (
  Leaf,
  Tensors,
  leaves_of,
  param_shapes,
  read_params,
  read_sharded,
)
from mcjax.base.parts import stored_tensors
from mcjax.base.tokenizer import Tokenizer
from mcjax.parallel.sharding import RULES, Rules
from mcjax.types import McjaxError

_DTYPES = ("float32", "bfloat16")
_MAX_HEADER = 1 << 23  # bytes that describe the tensors of a file
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "model*.bin")


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
  source: str | os.PathLike, *, dtype: str = "float32", mesh=None, rules=RULES
) -> BaseLM:
  """Loads a frozen base LM, and keeps compiled programs from now on.

  The programs lie in the user cache, see `compilation_cache.keep_programs`.

  Args:
    source: a name of `hub.NAMED_MODELS` ("smollm2-135m"), a Hugging Face
      folder (config.json, safetensors, a tokenizer's files), a Hugging Face id
      ("owner/model", downloaded), or the path of a .gguf file.
    dtype: of all parameters, "float32" or "bfloat16".
    mesh: of `parallel.sharding.make_mesh`, over which the parameters are
      split; every process reads only the parts of its own devices. None takes
      the default device.
    rules: how they are split, see `parallel.sharding.Rules`.

  Returns:
    The base LM, its parameters on the default device or the mesh.

  Raises:
    McjaxError: the source is unknown, missing, damaged, or a model that the
      decoder does not implement.
  """
  check_dtype(dtype)
  keep_programs()
  path = locate(os.fspath(source))
  name = os.path.basename(os.fspath(source).rstrip("/\\")) or str(source)
  try:
    opened = _open_folder(path) if path.is_dir() else _open_gguf(path)
    with opened as (config, tensors, leaves, tokenizer):
      kind = np.dtype(jnp.dtype(dtype))
      shardings = None if mesh is None else _shardings(config, rules, mesh)
      return assembled(
        name, config, tensors, leaves, tokenizer, kind, shardings)
  except McjaxError as e:
    raise McjaxError(f"{path}: {e}") from e


def check_dtype(dtype: str) -> None:
  """Refuses a dtype that parameters do not have."""
  if dtype not in _DTYPES:
    raise McjaxError(f"dtype must be one of {_DTYPES}, got {dtype!r}")


def assembled(
  name: str, config: DecoderConfig, tensors: Tensors, leaves: dict[str, Leaf],
  tokenizer: Tokenizer, dtype: np.dtype, shardings: dict | None = None,
) -> BaseLM:
  """A base of a checkpoint's tensors and its tokenizer.

  Args:
    name: of the base.
    config: sizes.
    tensors: of the checkpoint.
    leaves: where the parameters are in it.
    tokenizer: of the base.
    dtype: of all parameters.
    shardings: of the parameters on a mesh; None takes the default device.
  """
  if shardings is None:
    params, digest = read_params(config, tensors, leaves, dtype)
  else:
    params, digest = read_sharded(config, tensors, leaves, dtype, shardings)
  if tokenizer.largest_text_id() >= config.vocab_size:
    raise McjaxError(
      f"the tokenizer has ids up to {tokenizer.largest_text_id()}, the "
      f"embedding only {config.vocab_size} rows"
    )
  digest.update(tokenizer.vocabulary_digest())
  return BaseLM(name, config, params, tokenizer, digest.hexdigest())


def load_decoder_config(source: str | os.PathLike) -> DecoderConfig:
  """Sizes of a base, of which its config.json is enough; nothing is loaded.

  Args:
    source: as of `load_base_lm`, or the path of a config.json.

  Raises:
    McjaxError: as `load_base_lm`.
  """
  path = pathlib.Path(os.fspath(source)).expanduser()
  try:
    if path.name == "config.json" and path.is_file():
      return _sizes(files.read_json(path))
    path = locate(os.fspath(source))
    if path.is_dir():
      return _sizes(files.read_json(path / "config.json"))
    with _open_gguf(path) as (config, *_):
      return config
  except McjaxError as e:
    raise McjaxError(f"{path}: {e}") from e


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a base; its weights are not read.

  Args:
    source: as of `load_base_lm`.

  Raises:
    McjaxError: as `load_base_lm`.
  """
  path = locate(os.fspath(source))
  try:
    if path.is_dir():
      return Tokenizer.from_folder(path)
    with _open_gguf(path) as (_, _, _, tokenizer):
      return tokenizer
  except McjaxError as e:
    raise McjaxError(f"{path}: {e}") from e


def _shardings(config: DecoderConfig, rules: Rules, mesh) -> dict:
  shapes = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
  return rules.shardings("base", shapes, mesh)


def locate(source: str) -> pathlib.Path:
  """Folder or GGUF file of a source, downloaded if need be.

  Args:
    source: as of `load_base_lm`.

  Raises:
    McjaxError: the source is unknown or missing.
  """
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


def _sizes(hf: dict) -> DecoderConfig:
  try:
    return decoder_config_from_hf(hf)
  except McjaxError as e:
    raise McjaxError(f"config.json: {e}") from e


@contextlib.contextmanager
def _open_folder(path: pathlib.Path) -> Iterator[tuple]:
  hf = files.read_json(path / "config.json")
  if isinstance(hf.get("text_config"), dict):
    raise McjaxError(
      "config.json describes a model of several kinds of input; take its "
      "text-only folder")
  config, folds = _sizes(hf), folds_from_hf(hf)
  tokenizer = Tokenizer.from_folder(path)
  with contextlib.ExitStack() as stack:
    tensors = _safetensors(path, stack)
    yield config, tensors, hf_leaves(config, folds), tokenizer


def _safetensors(path: pathlib.Path, stack: contextlib.ExitStack) -> Tensors:
  """Opens model.safetensors, or the shards that its index names."""
  one, many = "model.safetensors", "model.safetensors.index.json"
  anew = (f"save them anew as {one}: "
          "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)")
  if files.is_file(path / one):
    names = [one]
  elif files.is_file(path / many):
    index = files.read_json(path / many, files.MAX_INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
      raise McjaxError(f"{many} has no 'weight_map'")
    names = sorted({os.path.basename(str(name)) for name in index.values()})
  elif any(found for p in _PICKLES for found in path.glob(p)):
    raise McjaxError(
      f"its weights are pickled (.bin), which can run code; {anew}")
  else:
    raise McjaxError(f"no {one} and no {many}; weights of another form: "
                     f"{anew}")
  owner, shapes, stored = {}, {}, {}
  for name in names:
    handle = _open_safetensors(path / name, stack)
    for key in handle.keys():
      piece = handle.get_slice(key)
      if piece.get_dtype() not in _FLOATS:
        raise McjaxError(f"{key!r} in {name} is {piece.get_dtype()}")
      owner[key], shapes[key] = handle, tuple(piece.get_shape())
    stored.update(stored_tensors(path / name))
  return Tensors(
    shapes, lambda name: owner[name].get_tensor(name),
    lambda name, slices: stored[name].part(slices),
    lambda name, at: stored[name].points(at))


def _open_safetensors(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
  """An open file of tensors, its header within limits."""
  import safetensors

  if not files.is_file(path):
    raise McjaxError(f"{path.name} is missing")
  try:
    with path.open("rb") as file:
      size = int.from_bytes(file.read(8), "little")
    if size > _MAX_HEADER:
      raise McjaxError(f"{path.name} is damaged: its header has {size} bytes")
    return stack.enter_context(safetensors.safe_open(path, framework="numpy"))
  except (safetensors.SafetensorError, OSError) as e:
    raise McjaxError(f"{path.name} is damaged: {e}") from e


def hf_leaves(config: DecoderConfig, folds: Folds) -> dict[str, Leaf]:
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
  if config.post_norm:
    names.update(attn_post_norm="post_attention_layernorm.weight",
                 mlp_norm="pre_feedforward_layernorm.weight",
                 mlp_post_norm="post_feedforward_layernorm.weight")
  if config.family == "phi3":
    names.update(dict.fromkeys(("wq", "wk", "wv"), "self_attn.qkv_proj.weight"),
                 w_gate="mlp.gate_up_proj.weight",
                 w_up="mlp.gate_up_proj.weight")
  names = {key: layer + name for key, name in names.items()}
  names.update(
    embed="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    unembed="lm_head.weight",
  )
  return leaves_of(config, names, permuted=False, folds=folds)


# --- GGUF --------------------------------------------------------------------


@contextlib.contextmanager
def _open_gguf(path: pathlib.Path) -> Iterator[tuple]:
  file = GgufFile(path)
  config, folds = decoder_config_from_gguf(file), folds_from_gguf(file)
  stored = {name: file.stored(name) for name in file.tensors}
  shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
  tokenizer = Tokenizer.from_gguf(file)
  file.fields.clear()  # a text per token of the vocabulary
  tensors = Tensors(
    shapes, file.read, lambda name, slices: stored[name].part(slices),
    lambda name, at: stored[name].points(at))
  yield config, tensors, _gguf_leaves(config, folds), tokenizer


def _gguf_leaves(config: DecoderConfig, folds: Folds) -> dict[str, Leaf]:
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
    attn_post_norm="post_attention_norm.weight",
    mlp_post_norm="post_ffw_norm.weight",
  )
  if config.family == "phi3":
    names.update(dict.fromkeys(("wq", "wk", "wv"), "attn_qkv.weight"),
                 w_gate="ffn_up.weight", w_up="ffn_up.weight")
  names = {key: "blk.{i}." + name for key, name in names.items()}
  names.update(
    embed="token_embd.weight",
    final_norm="output_norm.weight",
    unembed="output.weight",
  )
  permuted = config.family in ("llama", "smollm3", "granite")
  return leaves_of(config, names, permuted, folds)
