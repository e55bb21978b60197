"""Hyper-parameters within what a model of this kind can have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mcjax.types import McjaxError

MAX_SIZE = 1 << 31  # of anything that is counted
MOST = dict(
  n_layers=1 << 10, d_model=1 << 17, n_heads=1 << 12, n_kv_heads=1 << 12,
  head_dim=1 << 12, d_ff=1 << 20, vocab_size=1 << 24, max_positions=1 << 28,
)


def size(value: Any, field: str, most: int = MAX_SIZE) -> int:
  """A whole number from 1 to `most`.

  Raises:
    McjaxError: it is not; the field is named.
  """
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise McjaxError(f"{field} must be a positive integer, got {_told(value)}")
  if value > most:
    raise McjaxError(f"{field} must be at most {most}, got {_told(value)}")
  return value


def number(value: Any, field: str, least: float, most: float) -> float:
  """A finite number from `least` to `most`.

  float32 spellings lose their noise (9.99999974e-06 is 1e-05).

  Raises:
    McjaxError: it is not; the field is named.
  """
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise McjaxError(f"{field} must be a number, got {_told(value)}")
  if not least <= value <= most:  # false for NaN as well
    raise McjaxError(
      f"{field} must be from {least:g} to {most:g}, got {_told(value)}")
  short = float(str(np.float32(value)))
  return short if math.isfinite(short) else float(value)


def _told(value: Any) -> str:
  if isinstance(value, int) and abs(value) >= 1 << 64:
    return "a larger number"
  text = repr(value)
  return text if len(text) < 100 else text[:100] + "…"
