"""LoRA of the base's attention for reading gists (arXiv:2106.09685).

Low-rank maps beside the frozen projections of queries, keys, values and
outputs. They act at gists alone ("lora" in a GistNet's adapter), so that text
is computed as ever, or on every row ("lora_all"), where they are added to the
projections. Files are in the layout of PEFT: adapter_config.json and
adapter_model.safetensors, with the scope of the maps as one field more.
"""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mcjax.base.decoder_config import DecoderConfig
from mcjax.types import McjaxError

SCOPES = {"gists": "lora", "all": "lora_all"}
PROJECTIONS = ("q", "k", "v", "o")
_NAME = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
_SCOPE = "mcjax_scope"


def shape_of(config: DecoderConfig) -> tuple[int, int, int]:
  """(query heads, key heads, channels a head) of a base."""
  return config.n_heads, config.n_kv_heads, config.head_dim


def _sizes(d_model: int, shape) -> dict[str, tuple[int, tuple[int, ...]]]:
  """{projection: (width of its input, shape of its output)}."""
  heads, keys, size = shape
  return {"q": (d_model, (heads, size)), "k": (d_model, (keys, size)),
          "v": (d_model, (keys, size)), "o": (heads * size, (d_model,))}


def init(layers: int, d_model: int, shape: tuple[int, ...], rank: int,
         key: jax.Array) -> dict:
  """Maps {projection: {"a" [L, width, r], "b" [L, r, …]}} that add nothing.

  Args:
    layers: of the base (L).
    d_model: its width.
    shape: see `shape_of`.
    rank: of the maps (r).
    key: of "a"; "b" is zero.
  """
  out = {}
  for number, (name, (width, end)) in enumerate(
      _sizes(d_model, shape).items()):
    a = jax.random.normal(
      jax.random.fold_in(key, number), (layers, width, rank), jnp.float32)
    out[name] = {"a": a / np.float32(np.sqrt(width)),
                 "b": jnp.zeros((layers, rank, *end), jnp.float32)}
  return out


def weights_per_layer(d_model: int, shape: tuple[int, ...], rank: int) -> int:
  """Numbers in the maps of one layer."""
  return rank * sum(width + int(np.prod(end))
                    for width, end in _sizes(d_model, shape).values())


def merged(layers: dict, maps: dict) -> dict:
  """The base's stacked layers with the maps added to their projections."""
  out = dict(layers)
  for name in PROJECTIONS:
    a, b = maps[name]["a"], maps[name]["b"]
    own = layers[f"w{name}"]
    added = jnp.einsum("lwr,lre->lwe", a, b.reshape(*b.shape[:2], -1))
    out[f"w{name}"] = (own.astype(jnp.float32)
                       + added.reshape(own.shape)).astype(own.dtype)
  return out


def save(folder, adapter: dict, base_name: str) -> None:
  """Writes the maps of a GistNet's adapter as a PEFT folder.

  Args:
    folder: made if it is not there.
    adapter: the "adapter" of a GistNet's parameters.
    base_name: of the base, for whoever loads it elsewhere.

  Raises:
    McjaxError: the adapter has no maps.
  """
  scope = next((s for s, key in SCOPES.items() if key in adapter), None)
  if scope is None:
    raise McjaxError("this GistNet has no LoRA: train it with "
                     "--config.gistnet.lora_rank=8")
  maps, tensors = adapter[SCOPES[scope]], {}
  for name in PROJECTIONS:
    for part in "ab":
      for i, value in enumerate(np.asarray(maps[name][part], np.float32)):
        flat = value if part == "a" else value.reshape(value.shape[0], -1)
        tensors[_NAME.format(i, name, part.upper())] = np.ascontiguousarray(
          flat.T)
  rank = int(maps["q"]["a"].shape[-1])
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
  (folder / "adapter_config.json").write_text(json.dumps({
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank,
    "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
    "target_modules": [f"{name}_proj" for name in PROJECTIONS],
    "base_model_name_or_path": base_name, "inference_mode": True,
    _SCOPE: scope}, indent=2) + "\n", encoding="utf-8")


def load(folder, config: DecoderConfig) -> tuple[str, dict]:
  """Reads a PEFT folder: its scope, and the maps as `init` has them.

  A folder that was not written here acts on every row, as PEFT's do. A
  projection that it leaves out gets maps that add nothing.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    config: of the base that it is for.

  Raises:
    McjaxError: no such folder, no LoRA, maps of other layers than the
      attention's, or of another base.
  """
  folder = pathlib.Path(folder)
  settings = _settings(folder)
  rank = settings["r"]
  scale = np.float32(settings["lora_alpha"] / rank)
  tensors = _tensors(folder)
  maps = {name: {"a": [], "b": []} for name in PROJECTIONS}
  for name, (width, end) in _sizes(
      config.d_model, shape_of(config)).items():
    shapes = {"a": (rank, width), "b": (int(np.prod(end)), rank)}
    for i in range(config.n_layers):
      for part, shape in shapes.items():
        key = _NAME.format(i, name, part.upper())
        value = tensors.pop(key, np.zeros(shape, np.float32))
        if value.shape != shape:
          raise McjaxError(f"{folder}: {key} is {list(value.shape)}, this base "
                           f"needs {list(shape)}")
        if not np.isfinite(value).all():
          raise McjaxError(f"{folder}: {key} holds NaN or infinite values")
        value = value.T.astype(np.float32)
        maps[name][part].append(
          value if part == "a" else scale * value.reshape(rank, *end))
  if tensors:
    raise McjaxError(f"{folder}: {min(tensors)} is no map of the base's "
                     "attention")
  return settings[_SCOPE], jax.tree.map(
    lambda parts: jnp.asarray(np.stack(parts)), maps,
    is_leaf=lambda x: isinstance(x, list))


def _settings(folder: pathlib.Path) -> dict:
  """What adapter_config.json says, checked."""
  path = folder / "adapter_config.json"
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise McjaxError(f"no PEFT adapter at {folder}: {error}") from error
  if not isinstance(found, dict) or found.get("peft_type") != "LORA":
    raise McjaxError(f"{path}: peft_type is not LORA")
  rank, alpha = found.get("r"), found.get("lora_alpha", found.get("r"))
  if type(rank) is not int or not 0 < rank <= 1024:
    raise McjaxError(f"{path}: r is {rank!r}")
  if type(alpha) not in (int, float) or not abs(alpha) < 1e6:
    raise McjaxError(f"{path}: lora_alpha is {alpha!r}")
  for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
    if found.get(name):
      raise McjaxError(f"{path}: {name} is not implemented")
  scope = found.get(_SCOPE, "all")
  if scope not in SCOPES:
    raise McjaxError(f"{path}: {_SCOPE} is {scope!r}, known: "
                     f"{', '.join(SCOPES)}")
  return {"r": rank, "lora_alpha": alpha, _SCOPE: scope}


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  path = folder / "adapter_model.safetensors"
  try:
    return load_file(path)
  except (OSError, SafetensorError, TypeError) as error:
    raise McjaxError(f"{path} is not a safetensors file: {error}") from error
