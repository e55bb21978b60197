"""FocusLoop: assemble, score, allocate, splice, decode, every 32 tokens.

The loop over token ids: what enters the history and what the LM says; `focus`
has what the window shows of it. Text, prompts and storage places are the
business of `runtime`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
import contextlib
from typing import TypeVar

import jax
import numpy as np

from mcjax.runtime.focus import Focus
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM
from mcjax.window.decoding import Draw, Job, Said
from mcjax.window.sampling import Sampling

Result = TypeVar("Result")


class FocusLoop(Focus):
  """One history, one window, one policy, and the LM that runs on them."""

  # --- what enters --------------------------------------------------------

  def remember(self, token_ids: np.ndarray) -> None:
    """Adds tokens to the tree only: gists of complete blocks included."""
    before = self.tree.num_nodes(1)
    with self.telemetry.phase("gist"):
      self.tree.append(token_ids)
    self.telemetry.count("gist_blocks", self.tree.num_nodes(1) - before)

  def append(self, token_ids: np.ndarray,
             continuation: np.ndarray | None = None) -> None:
    """Adds tokens to the tree and, at L0 as far as they fit, to the window.

    `continuation` is what the policy may know of the future; see `refocus`.
    """
    count = len(token_ids)
    if not count:
      return
    if self.tree.cursor and count <= self._config.window // 4:
      self._make_room(count, continuation)
    self.remember(token_ids)
    self.show(count)

  # --- what is said -------------------------------------------------------

  def draw(self, sampling: Sampling, seed: int | None = None,
           prompt: np.ndarray | None = None) -> Draw:
    """How one answer is drawn; without a seed, unlike any other one.

    `prompt` [n] are tokens that a repetition penalty counts as said.
    """
    if seed is None:
      self._key, key = jax.random.split(self._key)
    else:
      key = jax.random.key(seed)
    seen = np.zeros(self.context.lm.config.vocab_size, bool)
    if prompt is not None:
      seen[prompt] = True
    return Draw(sampling, key, seen=seen)

  def decode_block(self, wanted: int) -> tuple[np.ndarray, bool]:
    """Generates up to the end of the block; refocuses there if more is wanted.

    Valid after `sync`.

    Returns:
      token ids [n] and whether the last one is a stop token.
    """
    draw = self.draw(Sampling(temperature=self._config.temperature))
    said = run_alone(self.block(wanted, draw), self.context)
    if not said.stopped and len(said.tokens) < wanted:
      self.go_on()
    return said.tokens, said.stopped

  def block(self, wanted: int, draw: Draw, most: int = BRANCHING,
            cut: Callable[[Said], Said] | None = None
            ) -> Generator[Job, Said, Said]:
    """Yields a job for a decoder, takes what it said, and returns that.

    Args:
      wanted: tokens, at most; the block of the history ends the job too.
      draw: how they are drawn.
      most: tokens at most, to be shown soon.
      cut: shortens what was said.
    """
    limit = min(BRANCHING - self.tree.cursor % BRANCHING, wanted, most)
    self._make_room(limit)
    if not self.context.is_synced:
      self.sync()
    job = self.context.ask(limit, draw)
    with self.telemetry.phase("decode"):
      said = yield job
    if cut is not None:
      said = cut(said)
    self.context.take(job, said)
    self.telemetry.count("decoded_tokens", len(said.tokens))
    self.remember(said.tokens)
    self.check()
    return said

  def go_on(self) -> None:
    """Refocuses where a block has ended and more is to be said."""
    if self._due():
      self._refocus_and_sync()
      self.check()

  def _refocus_and_sync(self) -> None:
    every = self._config.delta_nll_every
    probe = every and (self.step + 1) % every == 0
    start = max(0, self.tree.cursor - BRANCHING)
    attention = self.context.window.attention
    if attention is not None:  # text before the prompt is hidden
      start = max(start, attention.start + 1)
    newest = self.tree.tokens(start, self.tree.cursor)
    before = self.context.probe_nll(newest) if probe else None
    edits = self.refocus(need=BRANCHING)
    if not self.context.is_synced:
      spliced = self.context.tokens_run
      self.sync()
      self.telemetry.count("splice_tokens", self.context.tokens_run - spliced)
    if edits and before is not None:
      change = self.context.probe_nll(newest) - before
      self.telemetry.record(
        "delta_nll", step=self.step, horizon=len(newest),
        nats=float(np.nanmean(change)),
      )

  @contextlib.contextmanager
  def undone(self) -> Iterator[None]:
    """What happens inside is not remembered: tree, window, cache, query."""
    snapshot, kept = self.context.snapshot(), self._small_state()
    try:
      with self.tree.transient():
        yield
    finally:
      key = self._key  # or two answers would be drawn alike
      self._back_to(snapshot, kept)
      self._key = key

  @contextlib.contextmanager
  def all_or_nothing(self) -> Iterator[None]:
    """If the body raises, all is as before it; unless it had committed.

    Keys and values that were overwritten are then computed again when they are
    needed.
    """
    mark = self.tree.mark()
    snapshot, kept = self.context.snapshot(exact=False), self._small_state()
    try:
      yield
    except BaseException:
      if self.tree.back_to(mark):
        self._back_to(snapshot, kept)
      raise

  def _small_state(self) -> tuple:
    return (self.query, self.sources, self.step, self._key, self._expanded,
            self._deeper)

  def _back_to(self, snapshot: tuple, kept: tuple) -> None:
    self.context.restore(snapshot)
    (self.query, self.sources, self.step, self._key, self._expanded,
     self._deeper) = kept

  def score(self, token_ids: np.ndarray) -> np.ndarray:
    """NLL [n] in nats of `token_ids`, teacher-forced; undoes everything."""
    with self.undone():
      return self._score(token_ids)

  def _score(self, ids: np.ndarray) -> np.ndarray:
    self.follow()
    out = []
    for a, b in _blocks(self.tree.cursor, len(ids)):
      chunk = ids[a:b]
      self.append(chunk, continuation=ids[a:])
      self.sync(renew=len(chunk) + 1)
      nll = self.context.newest_nll(chunk)
      self.telemetry.record(
        "score", cursor=self.tree.cursor, tokens=len(chunk),
        nll=float(np.nanmean(nll)) if np.any(np.isfinite(nll)) else None,
      )
      out.append(nll)
      if self._due() and b < len(ids):
        self.follow()
        self.refocus_deeper(ids[b:])
    return np.concatenate(out)


def run_alone(steps: Generator[Job, Said, Result], context: ContextLM
              ) -> Result:
  """What `steps` return, its jobs decoded one by one."""
  try:
    job = next(steps)
    while True:
      job = steps.send(context.decoder.run([job])[0])
  except StopIteration as end:
    return end.value


def _blocks(cursor: int, count: int) -> list[tuple[int, int]]:
  """Cuts [0, count) where the history, now at cursor, ends a block."""
  first = min(count, BRANCHING - cursor % BRANCHING)
  edges = [0, *range(first, count, BRANCHING), count]
  return list(zip(edges[:-1], edges[1:]))
