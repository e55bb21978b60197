"""Term weights by rarity, and reranking of blocks by their true tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcjax.tree.lexical_keys import PAIR
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING

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
  held, idf = _rarity(tree, query_ids, stop)
  return np.where(held > 0, weights * idf, 0).astype(np.float32)


def known_share(tree: MegaContextTree, query_ids: np.ndarray,
                weights: np.ndarray) -> float:
  """Share, in [0, 1], of a query's weight in tokens that some block holds.

  Arguments as of `query_weights`; here a token that no block holds weighs
  more than the rarest.
  """
  held, idf = _rarity(tree, query_ids)
  total = float(np.sum(weights * idf))
  return float(np.sum((weights * idf)[held > 0])) / total if total else 0.0


def _rarity(tree: MegaContextTree, query_ids: np.ndarray,
            stop: int | None = None):
  """Blocks that hold a token, and its idf, [Q] each."""
  blocks = tree.num_nodes(1) if stop is None else stop
  held = tree.block_frequency(query_ids, stop)
  return held, np.maximum(np.log((blocks + 1) / (held + 0.5)), 0) ** IDF_POWER


def rerank_scores(
  query_ids: np.ndarray, weights: np.ndarray, spans: np.ndarray
) -> np.ndarray:
  """Exact scores of blocks from their tokens and their neighbours'.

  As `coverage`; what only a neighbour holds counts half (a fact can straddle a
  boundary).

  Args:
    query_ids: int [Q].
    weights: float [Q].
    spans: int [n, 96], previous block, block, next block; -1 for no token.

  Returns:
    float64 [n], 1 if the block holds the whole query in order.
  """
  near = np.full(spans.shape[1], 0.5)
  near[BRANCHING : 2 * BRANCHING] = 1.0
  return coverage(query_ids, weights, spans, near)


def coverage(
  query_ids: np.ndarray, weights: np.ndarray, spans: np.ndarray,
  near: np.ndarray,
) -> np.ndarray:
  """Share of the query's weight that spans of tokens hold.

  Two adjacent query tokens that occur in order add `PAIR` times the smaller
  weight.

  Args:
    query_ids: int [Q].
    weights: float [Q].
    spans: int [n, T]; -1 for no token.
    near: float [T], what a token at this place counts, in [0, 1].

  Returns:
    float64 [n].
  """
  weights = np.asarray(weights, np.float64)
  ids, where = np.unique(query_ids, return_inverse=True)
  token_weight = np.zeros(len(ids))
  np.maximum.at(token_weight, where, weights)
  held = ((spans[:, :, None] == ids) * near[:, None]).max(axis=1)
  scores = held @ token_weight
  total = token_weight.sum()
  if len(query_ids) > 1:
    pairs = np.stack([query_ids[:-1], query_ids[1:]], axis=1)
    pairs, where = np.unique(pairs, axis=0, return_inverse=True)
    pair_weight = np.zeros(len(pairs))
    both = PAIR * np.minimum(weights[:-1], weights[1:])
    np.maximum.at(pair_weight, where.ravel(), both)
    first = spans[:, :-1, None] == pairs[:, 0]
    second = spans[:, 1:, None] == pairs[:, 1]
    near = np.maximum(near[:-1], near[1:])
    held = ((first & second) * near[:, None]).max(axis=1)
    scores += held @ pair_weight
    total += pair_weight.sum()
  return scores / total if total > 0 else scores


def rank_blocks(
  tree: MegaContextTree,
  blocks: Sequence[int],
  query_ids: np.ndarray,
  weights: np.ndarray,
) -> list[tuple[int, float]]:
  """Candidate blocks by `rerank_scores`, best first, ties newer first."""
  if not len(blocks):
    return []
  spans = np.full((len(blocks), 3 * BRANCHING), -1, np.int64)
  for row, block in zip(spans, blocks, strict=True):
    start = (block - 1) * BRANCHING
    low, high = max(start, 0), min(start + 3 * BRANCHING, tree.cursor)
    row[low - start : high - start] = tree.tokens(low, high)
  scores = rerank_scores(np.asarray(query_ids), weights, spans)
  found = sorted(zip(scores.tolist(), blocks, strict=True), reverse=True)
  return [(int(block), score) for score, block in found]
