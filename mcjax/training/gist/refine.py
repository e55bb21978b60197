"""Improves a tree's gists in idle time, by gradient, span by span.

GistNet writes a gist in one cheap pass; the frozen base could read more out of
one vector. Here the gists of a span start as they are stored and are fitted
(`fitting.py`) to continuations that the base samples behind the span's raw
tokens. Continuations that took no part decide: a span's gists are replaced only
if the base then follows these better. The gists above a span stay, so a span
is left alone until the parent that is made from it exists.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax.base.load import BaseLM
from mcjax.gist.encoder import GistEncoder
from mcjax.training.gist import fitting, recovery
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, McjaxError


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a span is fitted.

  Attributes:
    blocks: of a span, fitted together; divides 32.
    continuations: sampled for the fit.
    held_out: sampled to decide.
    continued: tokens of each.
    batch: continuations of a gradient step, in turn.
    steps: of Adam, and its rate below, in the units of the gists' channels.
    commit_every: seconds between two commits.
    seed: of the samples.
  """

  blocks: int = 8
  continuations: int = 8
  held_out: int = 4
  continued: int = 48
  batch: int = 4
  steps: int = 8
  rate: float = 0.02
  commit_every: float = 60.0
  seed: int = 0

  def __post_init__(self):
    if self.blocks < 1 or BRANCHING % self.blocks:
      raise McjaxError(f"blocks must divide {BRANCHING}, got {self.blocks}")
    if not 0 < self.batch <= self.continuations or self.held_out < 1:
      raise McjaxError("batch must be 1 to continuations, held_out 1 or more")


class Fitted(NamedTuple):
  """What became of a span.

  Attributes:
    start: its first block.
    old: [blocks, D] gists as they were.
    new: [blocks, D] as they are now; the old ones where these are better.
    before, after: KL in nats a token on the held-out continuations.
  """

  start: int
  old: np.ndarray
  new: np.ndarray
  before: float
  after: float

  @property
  def replaced(self) -> bool:
    return self.after < self.before


class Refiner:
  """Refines a tree that is open for writing.

  Args:
    tree: the history; no other process may have it open for writing.
    lm: its base.
    encoder: its GistNet, for the adapter that gists are read through.
    settings: how.
  """

  def __init__(self, tree: MegaContextTree, lm: BaseLM, encoder: GistEncoder,
               settings: Settings = Settings()):
    self._tree, self._lm, self._s = tree, lm, settings
    self._encoder = encoder
    self._reader = encoder.reader(lm).params

  def todo(self, start: int = 0, stop: int | None = None) -> list[int]:
    """First blocks of the spans still to refine, most read ones first.

    Args:
      start, stop: tokens; spans that reach out of them are left out. Newer
        spans go first among those that are read alike.
    """
    size, tree = self._s.blocks, self._tree
    count = tree.num_nodes(2) * BRANCHING
    first = -(-start // (size * BRANCHING))
    last = count // size
    if stop is not None:
      last = min(last, stop // (size * BRANCHING))
    done = np.zeros(count, np.int64)
    for a, b in tree.refined:
      done[a:b] = 1
    spans = np.arange(first, max(first, last))
    spans = spans[done.reshape(-1, size).sum(axis=1)[spans] < size]
    reads = self._reads(count).reshape(-1, size).sum(axis=1)[spans]
    return (spans[np.lexsort((-spans, -reads))] * size).tolist()

  def _reads(self, count: int) -> np.ndarray:
    """How often blocks [0, count) were brought in, as gist or as tokens."""
    tokens = self._tree.access_counts(0, 0, count * BRANCHING)
    own = self._tree.access_counts(1, 0, count).astype(np.int64)
    return own + tokens.reshape(count, BRANCHING).max(axis=1, initial=0)

  def fit(self, start: int) -> Fitted:
    """Fits the span from block `start` on; stores nothing."""
    s, lm = self._s, self._lm
    stop = start + s.blocks
    ids = jnp.asarray(
      self._tree.tokens(start * BRANCHING, stop * BRANCHING), jnp.int32)
    old = self._tree.gists(1, start, stop)
    key = jax.random.fold_in(jax.random.key(s.seed), start)
    tokens, teacher = fitting.sample(
      lm.params, lm.config, ids, key, s.continuations + s.held_out,
      s.continued)
    gists, moments = jnp.asarray(old), optax.adam(s.rate).init(jnp.asarray(old))
    for step in range(s.steps):
      turn = (step * s.batch + np.arange(s.batch)) % s.continuations
      gists, moments = fitting.step(
        self._reader, lm.config, gists, moments, tokens[turn], teacher[turn],
        s.rate)
    new = self._tree.as_stored(np.asarray(gists))
    held = slice(s.continuations, None)
    before, after = (
      float(fitting.divergence(jnp.asarray(g), self._reader, lm.config,
                               tokens[held], teacher[held]))
      for g in (old, new))
    if not after < before:
      new = old
    return Fitted(start, old, new, before, after)

  def store(self, fitted: list[Fitted]) -> None:
    """Commits spans: the better gists, and that the spans are done."""
    better = [f for f in fitted if f.replaced]
    width = self._s.blocks
    index = np.concatenate([
      np.zeros(0, np.int64), *(f.start + np.arange(width) for f in better)])
    gists = np.concatenate([
      np.zeros((0, self._tree.d_model), np.float32), *(f.new for f in better)])
    self._tree.amend_gists(
      index, gists, [(f.start, f.start + width) for f in fitted])

  def run(self, seconds: float, start: int = 0, stop: int | None = None,
          report: Callable[[Fitted, int], None] = lambda fitted, left: None
          ) -> list[Fitted]:
    """Refines for so long, or until nothing is left; every span is committed.

    A span that has begun is finished. What a kill loses are the spans since
    the last commit, `Settings.commit_every` seconds ago at most. An interrupt
    commits what is fitted.

    Args:
      seconds: of wall clock.
      start, stop: tokens, see `todo`.
      report: receives every span, and how many are left.

    Returns:
      the spans that were fitted.
    """
    todo, every = self.todo(start, stop), self._s.commit_every
    out: list[Fitted] = []
    begin = last = time.monotonic()
    stored = 0
    try:
      for number, first in enumerate(todo):
        if time.monotonic() - begin >= seconds:
          break
        out.append(self.fit(first))
        report(out[-1], len(todo) - number - 1)
        if time.monotonic() - last >= every:
          self.store(out[stored:])
          stored, last = len(out), time.monotonic()
    finally:
      if out[stored:]:
        self.store(out[stored:])
    return out

  def recovered(self, fitted: list[Fitted], horizon: int = 48) -> dict:
    """What the spans' gists recover of their tokens, before and after.

    On the history's own text behind each span, see `recovery.py`; spans with
    too little text behind them are left out.

    Returns:
      {"before" and "after": {"value", "low", "high", "n"}}, or nothing.
    """
    setting = recovery.Setting(blocks=self._s.blocks, horizon=horizon)
    known = [f for f in fitted
             if f.start * BRANCHING + setting.length <= self._tree.cursor]
    if not known:
      return {}
    ids = np.stack([
      self._tree.tokens(at, at + setting.length)
      for at in (f.start * BRANCHING for f in known)])
    names = ("text",) * len(known)
    bench = recovery.Bench(self._lm, recovery.Excerpts(ids, names, names),
                           setting, ("full", "drop"))
    losses = dict(bench.controls)
    for name in ("old", "new"):
      losses[name] = bench.score(
        np.stack([getattr(f, name) for f in known]), self._encoder)
    losses = recovery.over_horizon(losses | {"gist": losses["new"]})
    found = recovery.summarise(losses)["recovered"]
    return {"before": found["old"], "after": found["new"]}
