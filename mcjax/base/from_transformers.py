"""A base of a model and a tokenizer that `transformers` holds in memory.

Only the library's own classes are taken, never code that came with a model.
"""

from __future__ import annotations

import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from mcjax.base.config import decoder_config_from_hf, folds_from_hf
from mcjax.base.layout import Tensors
from mcjax.base.load import BaseLM, assembled, check_dtype, hf_leaves
from mcjax.base.slow_tokenizer import core_text
from mcjax.base.tokenizer import Tokenizer
from mcjax.types import McjaxError


def from_transformers(model: Any, tokenizer: Any, *, dtype: str = "float32",
                      name: str | None = None) -> BaseLM:
  """A frozen base of a model and a tokenizer that are in memory.

  The weights are copied; the model may be deleted afterwards.

  Args:
    model: a causal LM of `transformers`, of a family that mcjax knows.
    tokenizer: its tokenizer.
    dtype: of all parameters, "float32" or "bfloat16".
    name: of the base, by which shipped weights and a card are found; that of
      the model's folder or id by default.

  Raises:
    McjaxError: a model of another library or of remote code, quantised
      weights, or an architecture that the decoder does not implement.
  """
  check_dtype(dtype)
  _check_own(model, "transformers.models.", "model")
  hf = json.loads(model.config.to_json_string())
  config, folds = decoder_config_from_hf(hf), folds_from_hf(hf)
  path = str(getattr(model, "name_or_path", "") or "")
  name = name or os.path.basename(path.rstrip("/\\")) or config.family
  return assembled(
    name, config, _tensors(model), hf_leaves(config, folds),
    wrapped(tokenizer, _stops(model)), np.dtype(jnp.dtype(dtype)))


def wrapped(tokenizer: Any, stop_ids=()) -> Tokenizer:
  """A tokenizer of `transformers` as mcjax has it.

  Args:
    tokenizer: one with a fast implementation, or one that converts to it.
    stop_ids: ids that end a text, beside the tokenizer's own.

  Raises:
    McjaxError: it is of another library, or has no fast form.
  """
  _check_own(tokenizer, "transformers.", "tokenizer")
  template = getattr(tokenizer, "chat_template", None)
  settings = {
    "chat_template": template.get("default") if isinstance(template, dict)
    else template,
    "add_bos_token": getattr(tokenizer, "add_bos_token", None),
    **tokenizer.special_tokens_map}
  if settings["add_bos_token"] is None:
    del settings["add_bos_token"]  # the post-processor says it
  stops = [*stop_ids, tokenizer.eos_token_id]
  return Tokenizer.from_parts(core_text(tokenizer), settings, stops)


def _check_own(thing: Any, home: str, what: str) -> None:
  module = type(thing).__module__
  if not module.startswith(home):
    raise McjaxError(
      f"the {what} is a {module}.{type(thing).__name__}, not one of "
      "transformers' own classes")


def _stops(model: Any) -> list[int]:
  found: list[int] = []
  for part in (model.config, getattr(model, "generation_config", None)):
    ids = getattr(part, "eos_token_id", None)
    found += ids if isinstance(ids, list) else [ids] if ids is not None else []
  return found


def _tensors(model: Any) -> Tensors:
  state = model.state_dict()
  for name, value in state.items():
    if not value.is_floating_point():
      raise McjaxError(f"{name!r} is {value.dtype}: take the unquantised model")

  def read(name: str) -> np.ndarray:
    return state[name].detach().cpu().float().numpy()

  return Tensors(
    {name: tuple(value.shape) for name, value in state.items()}, read,
    lambda name, slices: read(name)[slices],
    lambda name, at: read(name)[at])
