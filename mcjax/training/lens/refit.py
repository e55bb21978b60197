"""Fits a LensNet to another GistNet without labels.

LensNet reads gists through two linear projections. Another GistNet writes other
vectors for the same text; the projections of these are fitted, by least squares
on training text, to what the old projections made of the old gists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mcjax.gist.encoder import GistEncoder
from mcjax.types import BRANCHING

_RIDGE = 1e-4  # of the mean square of an input
_HELD = 10  # every tenth row tells how good the fit is


def _unit(x: np.ndarray) -> np.ndarray:
  """As LensNet's norm of its inputs [n, D]."""
  x = x.astype(np.float64)
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _solve(kernel: np.ndarray, groups: Sequence) -> np.ndarray:
  """Kernel [D, w] for the new of (old, new) inputs; groups weigh alike."""
  inputs = np.concatenate([_unit(new) / len(new) ** 0.5 for _, new in groups])
  wanted = np.concatenate(
    [_unit(old) @ kernel / len(old) ** 0.5 for old, _ in groups])
  square = inputs.T @ inputs
  ridge = _RIDGE * np.trace(square) / len(square)
  return np.linalg.solve(
    square + ridge * np.eye(len(square)), inputs.T @ wanted)


def _unexplained(kernel, fitted, old, new) -> float:
  """Share of the old projections' variance that the fitted ones miss."""
  wanted = _unit(old) @ kernel
  spread = np.sum(np.square(wanted - wanted.mean(axis=0)))
  return float(np.sum(np.square(_unit(new) @ fitted - wanted)) / spread)


def refit(score: Mapping, old: GistEncoder, new: GistEncoder,
          embeddings: np.ndarray, ids: np.ndarray
          ) -> tuple[dict, dict[str, float]]:
  """Parameters of `LensNet` for gists of `new` instead of `old`.

  Args:
    score: the parameters of `LensNet`; not changed.
    old: the GistNet that they were trained with.
    new: another one for the same base.
    embeddings: [V, D] of the base, which the tail holds beside gists.
    ids: [n, 1024] int32 training text.

  Returns:
    the parameters, and for each projection the share of variance that it
    misses on tenth parts that were left out.
  """
  blocks = ids.reshape(-1, BRANCHING)
  lower = [e.encode_tokens(blocks) for e in (old, new)]
  upper = [e.encode_gists(g.reshape(-1, BRANCHING, g.shape[-1]), 2)
           for e, g in zip((old, new), lower)]
  tokens = embeddings[blocks[:, 0]]
  held = np.arange(len(blocks)) % _HELD == 0
  kept = [g[~held] for g in lower]
  sources = {"project_gists": [kept],
             "project_tail": [kept, upper, (tokens, tokens)]}
  out, missed = dict(score), {}
  for name, groups in sources.items():
    kernel = np.asarray(score[name]["kernel"], np.float64)
    fitted = _solve(kernel, groups)
    missed[name] = _unexplained(kernel, fitted, *(g[held] for g in lower))
    out[name] = dict(score[name]) | {"kernel": fitted.astype(np.float32)}
  return out, missed
