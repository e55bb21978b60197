"""Glossary: the axis letters and the small value types every module shares.

Axis letters, used in einsums and in the shapes of signatures, which jaxtyping
checks while the tests run:

  B batch            T query positions     S key slots        L decoder layer
  N query heads      K key/value heads     G = N / K          H head dim
  D model width      F feed-forward width  V vocabulary       W window slots
  C children (32)    M slots per gist      E entries of the working context
  R rows of LensNet  n any count

Time is counted in tokens from the start of the history. A node of level l
with index j covers tokens [j * 32**l, (j + 1) * 32**l); level 0 is the tokens
themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
  import jax
  import numpy as np

BRANCHING = 32  # children per node, and tokens per L1 gist

if TYPE_CHECKING:
  Array: TypeAlias = jax.Array | np.ndarray
else:
  Array = Any  # importing this must not load JAX; what has a shape and dtype


def span_width(level: int) -> int:
  """Tokens covered by one node of `level`."""
  return BRANCHING**level


class Entry(NamedTuple):
  """One entry of the working context: tokens [start, stop) at `level`."""

  level: int
  start: int
  stop: int


class McjaxError(ValueError):
  """A user's mistake, told in one line; command line tools print only it."""
