"""What LensNet is trained on: the worth of blocks, and finding them by keys.

  regression   score against tanh(worth / unit), labels and cheap estimates
  ranking      pairs of one window in the order of their worth
  budget       wishes for detail and offers to collapse balance
  illegality   no offer to collapse what is pinned
  match        the query's key picks worthy blocks of its window, and made-up
               facts among other facts and random text
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.lens import features as lens_rows
from mcjax.lens import network as lensnet
from mcjax.lens.features import MARGIN, RAW, LensInputs
from mcjax.training.lens.labels import Labelled
from mcjax.types import BRANCHING, Array, McjaxError

UNIT = 0.1  # nats a token at which the score saturates


@dataclasses.dataclass(frozen=True)
class LensObjective:
  """Weights of the terms; hashable, a jit static.

  Attributes:
    regression, ranking, budget, illegality, match: of the terms.
    cheap: weight of a cheap estimate beside a label in the regression.
    margin: nats a token by which a pair must differ to be ranked, and above
      which a block is worth matching.
    sharpness: factor of the cosine in the matching softmax.
  """

  regression: float = 1.0
  ranking: float = 0.5
  budget: float = 0.1
  illegality: float = 0.3
  match: float = 0.5
  cheap: float = 0.3
  margin: float = 0.01
  sharpness: float = 16.0


class Windows(NamedTuple):
  """N labelled windows, stacked and padded.

  Attributes:
    inputs: `LensInputs` with a leading [N].
    worth: [N, R] float32, NaN where unknown.
    cheap: [N, R] float32 estimate in the unit of worth, NaN where unknown.
    pinned: [N, R] bool.
  """

  inputs: LensInputs
  worth: np.ndarray
  cheap: np.ndarray
  pinned: np.ndarray


class Pairs(NamedTuple):
  """Questions and the blocks that answer them, and blocks of other text.

  Attributes:
    questions: [P, QUERY] int32, -1 for none.
    blocks: [P, 32] int32.
    others: [M, 32] int32.
  """

  questions: np.ndarray
  blocks: np.ndarray
  others: np.ndarray


def stack(windows: Sequence[Labelled], embed: np.ndarray, encoder,
          rows: int = 96) -> Windows:
  """Stacks windows; gists are made anew by `encoder`.

  Args:
    windows: at least one.
    embed: [V, D] float32 the base's embeddings.
    encoder: the GistNet.
    rows: R of the result; further rows are dropped.

  Raises:
    McjaxError: there is nothing to stack.
  """
  if not windows:
    raise McjaxError("there are no labelled windows to learn from")
  n, d = len(windows), embed.shape[1]
  ids = np.full((n, rows, lens_rows.SPAN), -1, np.int32)
  state = np.zeros((n, rows), np.int32)
  distance = np.zeros((n, rows), np.float32)
  mask, pinned = np.zeros((2, n, rows), bool)
  worth, cheap = np.full((2, n, rows), np.nan, np.float32)
  tail = np.zeros((n, lens_rows.TAIL, d), np.float32)
  for i, w in enumerate(windows):
    count = min(rows, len(w.state))
    for whole, part in ((ids, w.ids), (state, w.state), (worth, w.worth),
                        (distance, w.distance), (cheap, w.cheap),
                        (pinned, w.pinned)):
      whole[i, :count] = part[:count]
    mask[i, :count] = True
    newest = w.newest_ids[w.newest_ids >= 0]
    first = lens_rows.TAIL_GISTS + 1
    tail[i, :first] = w.tail
    tail[i, first : first + len(newest)] = embed[newest]
  gists = np.zeros((n, rows, d), np.float32)
  gists[mask] = encoder.encode_tokens(
    np.maximum(ids[mask][:, MARGIN:-MARGIN], 0))

  def joined(name: str) -> np.ndarray:
    return np.stack([getattr(w, name) for w in windows])

  inputs = LensInputs(
    ids, gists, state, distance, mask, joined("query_ids"),
    joined("query_weights"), joined("query_rarity"), joined("newest_ids"),
    joined("newest_rarity"), joined("asked").astype(np.float32), tail,
    joined("tail_mask"))
  return Windows(inputs, worth, cheap * _slope(worth, cheap), pinned)


def _slope(worth: np.ndarray, cheap: np.ndarray) -> np.float32:
  """Least-squares factor from the cheap estimate to the worth."""
  both = np.isfinite(worth) & np.isfinite(cheap)
  x, y = np.clip(cheap[both], -0.5, 0.5), np.clip(worth[both], -0.5, 0.5)
  return np.float32((x @ y) / max(float(x @ x), 1e-6)) if len(x) else (
    np.float32(1))


def matches(tables, inputs: LensInputs) -> jax.Array:
  """Cosine [R] of the blocks' keys and the query's."""
  keys = lensnet.block_keys(tables, inputs.ids[:, MARGIN:-MARGIN])
  query = lensnet.query_key(tables, inputs.query_ids, inputs.query_weights)
  return keys @ query


def loss(params, config: lensnet.LensNetConfig, o: LensObjective,
         embed: jax.Array, windows: Windows, pairs: Pairs):
  """Loss of a batch of windows and question pairs.

  Returns:
    loss [] and a dictionary of [] float32 terms.
  """
  tables = lensnet.key_tables(params, config, embed)
  match = jax.vmap(lambda x: matches(tables, x))(windows.inputs)
  z = jax.vmap(lambda x, m: lensnet.logits(params, config, x, m))(
    windows.inputs, match)
  score = jnp.tanh(z)
  known = jnp.isfinite(windows.worth)
  worth = jnp.where(known, windows.worth, 0.0)
  guessed = jnp.isfinite(windows.cheap) & ~known
  target = jnp.where(guessed, jnp.nan_to_num(windows.cheap), worth)
  weight = _real(known) + o.cheap * _real(guessed)
  error = jnp.square(score - jnp.tanh(target / UNIT)) * weight
  raw = windows.inputs.state == RAW
  mask = windows.inputs.mask
  wishes = jnp.sum(jax.nn.relu(score) * _real(mask & ~raw), axis=1)
  offers = jnp.sum(jax.nn.relu(-score) * _real(mask & raw), axis=1)
  rows = jnp.maximum(jnp.sum(_real(mask), axis=1), 1)
  pinned = _real(windows.pinned)
  terms = {
    "regression": jnp.sum(error) / (jnp.sum(weight) + 1e-6),
    "ranking": _ranking(z, worth, known, o.margin),
    "budget": jnp.mean(jnp.square((wishes - offers) / rows)),
    "illegality": jnp.sum(jnp.square(jax.nn.relu(-score)) * pinned)
    / (jnp.sum(pinned) + 1e-6),
    "match": _matching(match, worth, known, o) + _pairing(tables, pairs, o),
  }
  total = sum(getattr(o, name) * value for name, value in terms.items())
  return total, terms | {"loss": total}


def _real(mask: Array) -> jax.Array:
  return jnp.asarray(mask, jnp.float32)


def _ranking(z, worth, known, margin) -> jax.Array:
  """Logistic loss over pairs of a window that differ by the margin."""
  difference = worth[:, :, None] - worth[:, None]
  pair = _real(known[:, :, None] & known[:, None] & (difference > margin))
  cost = jax.nn.softplus(z[:, None] - z[:, :, None])
  return jnp.sum(cost * pair) / (jnp.sum(pair) + 1e-6)


def _matching(match, worth, known, o: LensObjective) -> jax.Array:
  """Cross-entropy of the matching softmax against shares of the worth."""
  gain = jnp.where(known, jax.nn.relu(worth - o.margin), 0.0)
  total = jnp.sum(gain, axis=1)
  scores = jnp.where(known, o.sharpness * match, -1e9)
  chosen = jax.nn.log_softmax(scores, axis=1)
  cost = -jnp.sum(gain * jnp.where(known, chosen, 0.0), axis=1) / (
    total + 1e-6)
  some = _real(total > 0)
  return jnp.sum(cost * some) / (jnp.sum(some) + 1e-6)


def _pairing(tables, pairs: Pairs, o: LensObjective) -> jax.Array:
  """Cross-entropy of finding a question's block among all others."""
  ones = jnp.ones(pairs.questions.shape, jnp.float32)
  queries = lensnet.query_key(tables, pairs.questions, ones)
  keys = lensnet.block_keys(
    tables, jnp.concatenate([pairs.blocks, pairs.others]))
  chosen = jax.nn.log_softmax(o.sharpness * queries @ keys.T, axis=1)
  return -jnp.mean(jnp.diagonal(chosen))


def draw_pairs(count: int, others: int, tokenizer, host: np.ndarray,
               draw_fact, seed: int) -> Pairs:
  """Made-up facts at random places of blocks of real text.

  Args:
    count: P.
    others: M.
    tokenizer: of the base.
    host: [N] int32 real text.
    draw_fact: rng -> `focus_tasks.Fact`.
    seed: of everything drawn.
  """
  rng = np.random.default_rng([11, seed])

  def stretch() -> np.ndarray:
    at = int(rng.integers(0, len(host) - BRANCHING))
    return np.array(host[at : at + BRANCHING], np.int32)

  questions = np.full((count, lens_rows.QUERY), -1, np.int32)
  blocks = np.zeros((count, BRANCHING), np.int32)
  for i in range(count):
    fact = draw_fact(rng)
    ids = tokenizer.encode(fact.question)[-lens_rows.QUERY :]
    questions[i, : len(ids)] = ids
    block, text = stretch(), tokenizer.encode(f" {fact.text}")
    # A fact may straddle blocks: at least two thirds of it are in this one.
    low, high = -(len(text) // 3), BRANCHING - 2 * len(text) // 3
    at = int(rng.integers(low, max(low + 1, high)))
    a, b = max(at, 0), min(at + len(text), BRANCHING)
    block[a:b] = text[a - at : b - at]
    blocks[i] = block
  return Pairs(questions, blocks,
               np.stack([stretch() for _ in range(others)]))
