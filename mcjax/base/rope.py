"""RoPE's frequencies where they are not those of one base alone.

Each scaling of a longer context comes down to other frequencies and a factor
on cosines and sines, both known before anything runs: linear (every frequency
divided), YaRN (arXiv:2309.00071) and LongRoPE (arXiv:2402.13753).
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import numpy as np

from mcjax.base import checks
from mcjax.types import McjaxError

KINDS = ("default", "llama3", "linear", "yarn", "longrope")


class Rope(NamedTuple):
  """How positions turn queries and keys.

  Attributes:
    freqs: radians a position, one for each pair of channels turned.
    magnitude: factor on cosines and sines.
  """

  freqs: tuple[float, ...]
  magnitude: float = 1.0


def plain(theta: float, dims: int) -> np.ndarray:
  """Frequencies [dims / 2] float32 of one base."""
  exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
  return np.float32(1) / np.float32(theta) ** exponents


def scaled(
  kind: str, rope: Mapping[str, Any], theta: float, dims: int,
  max_positions: int,
) -> Rope:
  """Frequencies of a scaled RoPE.

  Args:
    kind: default, linear, yarn or longrope.
    rope: its settings in Hugging Face's spelling.
    theta: the base.
    dims: channels of a head that are turned.
    max_positions: of the model as configured.

  Raises:
    McjaxError: a setting is missing or out of range.
  """
  freqs = plain(theta, dims)
  if kind == "default":
    return _rope(freqs)
  if kind == "linear":
    return _rope(freqs / np.float32(_factor(rope, kind)))
  if kind == "yarn":
    return _yarn(rope, freqs, theta, dims, max_positions)
  return _longrope(rope, freqs, max_positions)


def _rope(freqs: np.ndarray, magnitude: float = 1.0) -> Rope:
  return Rope(tuple(float(f) for f in freqs.astype(np.float32)), magnitude)


def _factor(rope: Mapping[str, Any], kind: str) -> float:
  if rope.get("factor") is None:
    raise McjaxError(f"rope_type {kind!r} needs 'factor'")
  return checks.number(rope["factor"], "factor", 0.01, 1e6)


def _original(rope: Mapping[str, Any], default: int) -> int:
  name = "original_max_position_embeddings"
  given = rope.get(name)
  return checks.size(default if given is None else given, name)


def _yarn(rope, freqs, theta: float, dims: int, max_positions: int) -> Rope:
  """Fast frequencies stay, slow ones are divided, a ramp lies between."""
  factor, original = _factor(rope, "yarn"), _original(rope, max_positions)

  def told(name: str, default: float) -> float:
    value = rope.get(name)
    return checks.number(default if value is None else value, name, 0, 1e6)

  def place(turns: float) -> float:
    return dims * math.log(original / (turns * 2 * math.pi)) / (
      2 * math.log(theta))

  low, high = place(told("beta_fast", 32)), place(told("beta_slow", 1))
  if rope.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dims - 1)
  ramp = (np.arange(dims // 2, dtype=np.float32) - low) / np.float32(
    (high - low) or 0.001)
  kept = 1 - np.clip(ramp, 0, 1)
  mixed = freqs / np.float32(factor) * (1 - kept) + freqs * kept

  def magnitude(scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

  if rope.get("attention_factor") is not None:
    return _rope(mixed, told("attention_factor", 1))
  one, all_dims = told("mscale", 0), told("mscale_all_dim", 0)
  if one and all_dims:
    return _rope(mixed, magnitude(one) / magnitude(all_dims))
  return _rope(mixed, magnitude())


def _longrope(rope, freqs, max_positions: int) -> Rope:
  """The factors of short contexts; the base is read no further than those."""
  divisors = rope.get("short_factor")
  if not isinstance(divisors, list) or len(divisors) != len(freqs):
    raise McjaxError(
      f"rope_type 'longrope' needs {len(freqs)} numbers as 'short_factor'")
  original = _original(rope, max_positions)
  factor = rope.get("factor")
  factor = max_positions / original if factor is None else checks.number(
    factor, "factor", 0.01, 1e6)
  magnitude = 1.0
  if rope.get("attention_factor") is not None:
    magnitude = checks.number(
      rope["attention_factor"], "attention_factor", 0, 1e6)
  elif factor > 1:
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original))
  numbers = [checks.number(d, "short_factor", 1e-6, 1e6) for d in divisors]
  return _rope(freqs / np.array(numbers, np.float32), magnitude)
