"""Term weights by rarity."""

from __future__ import annotations

import numpy as np

from mcjax.tree.tree import MegaContextTree

IDF_POWER = 1.5  # of the idf in a query weight; 1, 2, 3 did worse


def query_weights(
  tree: MegaContextTree, query_ids: np.ndarray, weights: np.ndarray,
  stop: int | None = None,
) -> np.ndarray:
  """Weights of query tokens by how few blocks hold them (idf).

  Args:
    tree: gives the number of blocks that hold a token.
    query_ids: int [Q].
    weights: float [Q], a prior per position, for instance by age.
    stop: only blocks before this one count; all by default.

  Returns:
    float32 [Q]: weight * ln((blocks + 1) / (blocks with the token + 0.5))**1.5,
    0 for a token that no block holds.
  """
  blocks = tree.num_nodes(1) if stop is None else stop
  held = tree.block_frequency(query_ids, stop)
  idf = np.maximum(np.log((blocks + 1) / (held + 0.5)), 0) ** IDF_POWER
  return np.where(held > 0, weights * idf, 0).astype(np.float32)
