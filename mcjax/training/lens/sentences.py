"""Teaches which sentences answer: `lens.sentence_net` on built questions.

For every question of a history the blocks are found and scored as the policy
does, with a trained LensNet; the sentences that touch the best ones are the
candidates, and those that tell the answer are known by construction
(`histories.py`). One file a history, not made again, so an interrupted run goes
on; the fit itself takes a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, cast

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax.answer.matching import Matcher
from mcjax.answer.reading import Reader, chosen
from mcjax.focus.policy import WISH
from mcjax.lens import features as lens_features
from mcjax.lens import network as lensnet
from mcjax.lens import sentence_net
from mcjax.lens.sentence_features import (
  FEATURES,
  MOST,
  candidates,
  sentence_features,
)
from mcjax.parallel import places
from mcjax.training.lens.prompts import Example, History
from mcjax.training.lens.windows import ROWS, WindowMaker
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, McjaxError

_TELLS = 0.5  # of `marked`, from which on a sentence tells
_ANY = 0.7  # of the loss: that one of the telling sentences is the best


@dataclasses.dataclass(frozen=True)
class ReaderFit:
  """How the choice of sentences is fitted.

  Attributes:
    steps: of Adam.
    batch: questions a step.
    learning_rate: the highest; it falls to 0 along a cosine.
    weight_decay: decoupled.
    hidden: width.
    seed: of everything drawn; not that of LensNet's training, whose scores are
      surer of the histories they were trained on.
  """

  steps: int = 2000
  batch: int = 64
  learning_rate: float = 3e-3
  weight_decay: float = 0.3
  hidden: int = sentence_net.HIDDEN
  seed: int = 1

  def __post_init__(self):
    for name in ("steps", "batch", "hidden"):
      if getattr(self, name) < 1:
        raise McjaxError(
          f"config.fit.{name} must be >= 1, got {getattr(self, name)}")


@dataclasses.dataclass
class SentenceSet:
  """Candidates of N questions.

  Attributes:
    features: [N, MOST, FEATURES] float16.
    tells: [N, MOST] float16 share of a sentence that tells the answer.
    span: [N, MOST, 2] int32 tokens of it; zeros for padding.
  """

  features: np.ndarray
  tells: np.ndarray
  span: np.ndarray

  @classmethod
  def load(cls, files: Sequence[epath.Path]) -> SentenceSet:
    """Questions of all files, in order."""
    parts = [places.load_arrays(path) for path in files]
    return cls(**{f.name: np.concatenate([p[f.name] for p in parts])
                  for f in dataclasses.fields(cls)})

  def __len__(self) -> int:
    return len(self.tells)

  @property
  def mask(self) -> np.ndarray:
    """[N, MOST] bool, False for padding."""
    return self.span[..., 1] > 0


class SentenceMaker:
  """Turns histories into files of candidate sentences."""

  def __init__(self, maker: WindowMaker, params, config: lensnet.LensNetConfig,
               embed: np.ndarray):
    """Prepares to score blocks.

    Args:
      maker: of trees and searches.
      params: LensNet's, trained.
      config: its sizes.
      embed: [V, D] float32 input embeddings of the base.
    """
    self._maker, self._params, self._config = maker, params, config
    self._embed = embed

  def write(self, path: epath.Path, history: History, number: int) -> None:
    """Writes the candidates of a history's questions, in one atomic step."""
    rng = np.random.default_rng([9, number])
    asked = sorted((e for e in history.examples if e.asked and e.gold),
                   key=lambda e: e.cursor)
    if not asked:
      return
    found: list[dict] = []
    table = self._maker.table
    table.clear()  # a word's vector is that of where it stood first
    tree = self._maker.tree(history.ids[: asked[0].cursor])
    matcher = Matcher(tree, table)
    reader = Reader(tree, table.tokenizer, matcher)
    for example in asked:
      if tree.cursor < example.cursor:
        tree.append(history.ids[tree.cursor : example.cursor])
      if tree.num_nodes(1) >= BRANCHING and len(example.query):
        found += self._question(tree, matcher, reader, example, rng)
    tree.close()
    if not found:
      return
    arrays: dict[str, Any] = {
      name: np.stack([f[name] for f in found]) for name in found[0]}
    places.save_arrays(path, **arrays)

  def _question(self, tree: MegaContextTree, matcher: Matcher, reader: Reader,
                example: Example, rng) -> list[dict]:
    """Candidates of one question; none if no block is wished for."""
    query, rows = self._maker.look(tree, matcher, example, rng)
    tail = lens_features.read_tail(
      tree, lambda ids: self._embed[ids], query)
    inputs = lens_features.gather(tree, rows, ROWS, query, matcher, tail)
    scores = np.asarray(lensnet.apply(
      self._params["score"], self._params["apart"], self._config, inputs)[0])
    scores = scores[: len(rows)]
    order = [i for i in np.argsort(-scores, kind="stable") if scores[i] > WISH]
    evidence = [(int(rows.block[i]), float(scores[i])) for i in order]
    spans, strength = candidates(reader, evidence, tree.cursor)
    if not spans:
      return []
    features = np.zeros((MOST, FEATURES), np.float16)
    features[: len(spans)] = sentence_features(
      matcher, query, spans, strength)
    tells, span = np.zeros(MOST, np.float16), np.zeros((MOST, 2), np.int32)
    tells[: len(spans)] = marked(spans, example.best or example.gold)
    span[: len(spans)] = spans
    return [dict(features=features, tells=tells, span=span)]


def marked(spans, marks) -> np.ndarray:
  """How far each span of tokens [S] tells what is marked, in [0, 1].

  That is the share of it that is marked, or, where that is more, the share of
  a marked span that it holds: a fact may be told within a long sentence.
  """
  a, b = np.array(spans).T
  held, most = np.zeros(len(spans)), np.zeros(len(spans))
  for low, high in marks:
    both = np.clip(np.minimum(b, high) - np.maximum(a, low), 0, None)
    held += both
    most = np.maximum(most, both / (high - low))
  return np.maximum(np.minimum(held / (b - a), 1.0), most)


def fit(kinds: Mapping[str, SentenceSet], mixture: Mapping[str, float],
        config: ReaderFit, report: Callable[[str], None] = print
        ) -> dict[str, Any]:
  """Parameters of `sentence_net`.

  Args:
    kinds: questions by kind.
    mixture: share of the questions of each kind in a batch.
    config: how.
    report: takes lines of progress.

  Raises:
    McjaxError: no candidate tells an answer.
  """
  rng = np.random.default_rng(config.seed)
  usable = {}
  for kind, some in kinds.items():
    rows = np.flatnonzero(((some.tells > _TELLS) & some.mask).any(axis=1))
    if len(rows) and mixture.get(kind, 0.0) > 0:
      usable[kind] = rows
  if not usable:
    raise McjaxError("no sentence among the candidates tells an answer: "
                     "nothing to fit the choice of sentences on")
  params = _normalised(
    sentence_net.init_params(config.seed, config.hidden), kinds, usable)
  names = list(usable)
  share = np.array([mixture[kind] for kind in names])
  schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
  optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
  state, advance = optimizer.init(params), _stepper(optimizer)
  for step in range(config.steps):
    drawn = rng.choice(len(names), config.batch, p=share / share.sum())
    batch = [_rows(kinds[name], rng.choice(usable[name], int(n)))
             for i, name in enumerate(names)
             if (n := (drawn == i).sum())]
    params, state, loss = advance(
      params, state, *map(np.concatenate, zip(*batch)))
    if (step + 1) % max(1, config.steps // 4) == 0:
      report(f"sentences: step {step + 1}, loss {float(loss):.3f}")
  return jax.device_get(params)


def _rows(some: SentenceSet, rows: np.ndarray) -> tuple:
  return (some.features[rows].astype(np.float32),
          some.tells[rows].astype(np.float32), some.mask[rows])


def _normalised(params: dict, kinds: Mapping[str, SentenceSet],
                usable: Mapping[str, np.ndarray]) -> dict:
  """Parameters that know mean and scale of the features."""
  seen = np.concatenate([
    kinds[kind].features[rows][kinds[kind].mask[rows]]
    for kind, rows in usable.items()]).astype(np.float32)
  return params | {"mean": jnp.asarray(seen.mean(0)),
                   "scale": jnp.asarray(1.0 / (seen.std(0) + 1e-2))}


def _loss(params, features, tells, mask):
  """Cross-entropy of the sentences that tell: of any, and of each."""
  logits = jax.vmap(lambda x: sentence_net.logits(params, x))(features)
  logits = jnp.where(mask, logits, -1e9)
  wanted = jnp.where((tells > _TELLS) & mask, tells, 0.0)
  all_of_it = jax.nn.logsumexp(logits, axis=1)
  one = all_of_it - jax.nn.logsumexp(
    jnp.where(wanted > 0, logits, -1e9), axis=1)
  share = wanted / wanted.sum(axis=1, keepdims=True)
  each = all_of_it - jnp.sum(share * jnp.where(mask, logits, 0.0), axis=1)
  return jnp.mean(_ANY * one + (1 - _ANY) * each)


def _stepper(optimizer: optax.GradientTransformation) -> Callable:
  """One step of training, compiled."""

  @jax.jit
  def step(params, state, features, tells, mask):
    loss, grads = jax.value_and_grad(_loss)(params, features, tells, mask)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats, counts
      updates, state = optimizer.update(grads, state, params)
    moved = cast(dict, optax.apply_updates(params, updates))
    fixed = {k: params[k] for k in ("mean", "scale")}
    return moved | fixed, state, loss

  return step


def evaluate(params, some: SentenceSet, most: int, least: float
             ) -> dict[str, float]:
  """What is read of the questions.

  Args:
    params: of `sentence_net`.
    some: the questions.
    most, least: tokens at most, and share of the best; see `Reader.spans`.

  Returns:
    first, read: share of questions whose best sentence, one of those read,
      tells the answer; tokens: that are read; known: share where one of the
      candidates does, the most that can be reached.
  """
  first, read, tokens = [], [], []
  for features, tells, span, mask in zip(
      some.features, some.tells, some.span, some.mask):
    count = int(mask.sum())
    likely = sentence_net.likelihood(
      params, features[:count].astype(np.float32))
    spans = [(int(a), int(b)) for a, b in span[:count]]
    kept = chosen(dict(zip(spans, likely.tolist())), most, least)
    telling = {s for s, t in zip(spans, tells) if t > _TELLS}
    first.append(tells[int(np.argmax(likely))] > _TELLS)
    read.append(any(a <= s[0] and s[1] <= b for s in telling for a, b in kept))
    tokens.append(sum(b - a for a, b in kept))
  known = ((some.tells > _TELLS) & some.mask).any(axis=1)
  return {"first": float(np.mean(first)), "read": float(np.mean(read)),
          "tokens": float(np.mean(tokens)), "known": float(known.mean())}
