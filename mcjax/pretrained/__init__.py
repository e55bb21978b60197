"""Shipped weights (one folder a base model) and their safetensors format.

A file holds a flat dictionary of float32, float16 and int8 tensors; its
metadata names the format, the version, the configuration and the facts of the
model card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mcjax.parallel.places import is_remote, place, write
from mcjax.pretrained import cards
from mcjax.types import McjaxError

FORMAT_VERSION = 1
_SMALL = (np.int8, np.float16)  # stored as they are
_MAX_HEADER = 1 << 22  # bytes that describe the tensors of a file
_MOST, _MOST_LAYERS = 1 << 20, 1 << 8  # of a setting, and of layers
_REPEATED = ("layers", "children_layers", "rounds", "levels", "adapter_layers",
             "slots_per_gist", "slot_parts")
_ROOT = pathlib.Path(__file__).parent


def flatten(params) -> dict[str, np.ndarray]:
  """{"a.b": array} of a nested dictionary; float32, but for what is small."""
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  return {".".join(k.key for k in path):
          np.asarray(leaf, leaf.dtype if leaf.dtype in _SMALL else np.float32)
          for path, leaf in flat}


def fingerprint(params, config: dict) -> str:
  """Hex digest of weights and configuration."""
  digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
  for name, value in sorted(flatten(params).items()):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()[:16]


def save_weights(path, kind: str, params, config: dict, card: dict) -> None:
  """Writes a weights file of `kind` ("gistnet", …) in one atomic step."""
  metadata = {
    "format": f"mcjax-{kind}",
    "version": str(FORMAT_VERSION),
    "config": json.dumps(config, sort_keys=True),
    "card": json.dumps(card, sort_keys=True),
  }
  write(place(path), save(flatten(params), metadata=metadata))


def read_weights(path, kind: str) -> tuple[dict, dict, dict]:
  """Reads (params, config, card) that `save_weights` wrote.

  What is stored as float16 is read as float32.

  Raises:
    McjaxError: no such file, not weights of `kind`, or of another version.
  """
  path = place(path)
  if not path.exists():
    raise McjaxError(f"no {kind} weights at {path}")
  if is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      return read_weights(path.copy(pathlib.Path(folder) / path.name), kind)
  if not os.path.isfile(path):
    raise McjaxError(f"{path} is not a regular file")
  try:
    with path.open("rb") as file:
      size = int.from_bytes(file.read(8), "little")
    if size > _MAX_HEADER:
      raise McjaxError(
        f"{path} is not a safetensors file: its header has {size} bytes")
    with safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      flat = {name: file.get_tensor(name) for name in file.keys()}
  except (SafetensorError, OSError, TypeError) as error:
    raise McjaxError(f"{path} is not a safetensors file: {error}") from error
  if metadata.get("format") != f"mcjax-{kind}":
    raise McjaxError(f"{path} holds no {kind} weights")
  if metadata.get("version") != str(FORMAT_VERSION):
    raise McjaxError(f"{path} has format version {metadata.get('version')}; "
                     f"this release reads {FORMAT_VERSION}")
  config = _metadata(path, metadata, "config")
  _check_sizes(path, config)
  params = _nested(path, flat)
  return params, config, _metadata(path, metadata, "card")


def laid_out(
  path, params: dict, make, settings: type, fields: dict, exact: bool = True
):
  """The configuration of weights that fit it.

  Args:
    path: of the file, for the words of an error.
    params: what it holds.
    make: parameters of a configuration; only their shapes are worked out.
    settings: class of the configuration.
    fields: of it, as they are stored.
    exact: whether the file may hold nothing else.

  Raises:
    McjaxError: a field is unknown, of another kind or out of range, or a
      weight is missing or of another shape.
  """
  try:
    for field in dataclasses.fields(settings):
      known = field.default is not dataclasses.MISSING
      kind = type(field.default) if known else int
      value = fields.get(field.name, field.default if known else None)
      if kind in (bool, int, float) and type(value) not in (kind, int):
        raise TypeError(f"{field.name} is {value!r}")
    config = settings(**fields)
    if pathlib.Path(path).is_relative_to(_ROOT):  # tests hold these to it
      return config
    expected = _shapes(jax.eval_shape(lambda: make(config)))
  except Exception as error:  # what JAX and Flax raise of absurd sizes
    why = " ".join(str(error).split())[:200]
    raise McjaxError(f"{path}: unknown configuration, {why}") from error
  found = _shapes(params)
  for name in {**expected, **(found if exact else {})}:
    if found.get(name) != expected.get(name):
      raise McjaxError(
        f"{path}: weights do not fit the stored configuration: {name!r} is "
        f"{found.get(name, 'missing')}, expected {expected.get(name, 'none')}")
  return config


def _shapes(params) -> dict[str, tuple[int, ...]]:
  """{"a.b": shape} of a nested dictionary."""
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  return {".".join(k.key for k in path): tuple(leaf.shape)
          for path, leaf in flat}


def _nested(path, flat: dict[str, np.ndarray]) -> dict:
  """{"a": {"b": array}} of {"a.b": array}, all of it finite numbers."""
  params: dict = {}
  for name, value in flat.items():
    if value.dtype == np.float16:
      value = value.astype(np.float32)
    if value.dtype != np.int8 and value.dtype != np.float32:
      raise McjaxError(f"{path}: {name!r} is of {value.dtype}")
    if not np.isfinite(value).all():
      raise McjaxError(f"{path}: {name!r} holds NaN or infinite values")
    *parents, leaf = name.split(".")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
      if not isinstance(node, dict):
        raise McjaxError(f"{path}: {name!r} is within another tensor")
    if leaf in node:
      raise McjaxError(f"{path}: {name!r} is within another tensor")
    node[leaf] = jax.device_put(value)  # as it is, with nothing to compile
  return params


def _metadata(path, metadata: dict[str, str], key: str) -> dict:
  """A JSON object of the metadata."""
  try:
    value = json.loads(metadata[key])
  except (KeyError, ValueError, RecursionError) as error:
    raise McjaxError(f"{path}: its {key!r} is missing or no JSON") from error
  if not isinstance(value, dict):
    raise McjaxError(f"{path}: its {key!r} is no JSON object")
  return value


def _check_sizes(path, config: dict) -> None:
  """Refuses settings that no network has, before one is laid out."""
  for name, value in config.items():
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) > _MOST_LAYERS:
      raise McjaxError(f"{path}: config {name!r} has {len(numbers)} entries")
    most = _MOST_LAYERS if name in _REPEATED else _MOST
    for number in numbers:
      if isinstance(number, (int, float)) and not -most <= number <= most:
        raise McjaxError(f"{path}: config {name!r} is {str(number)[:40]}")


def shipped(base_name: str, kind: str) -> pathlib.Path | None:
  """Path of the weights of `kind` shipped for a base of this name, if any."""
  card = cards.find(base_name)
  for folder in (base_name, card.nets if card else ""):
    path = _ROOT / folder / f"{kind}.safetensors"
    if folder and path.is_file():
      return path
  return None
