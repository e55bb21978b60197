"""The loop in steady state, for measuring: trees of real text, a full window.

What the suites share that drive `FocusLoop` directly: a tree of a given length
made once, and a loop whose window is full, whose answer never ends and whose
focus is edited at every refocus.
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import time

import numpy as np

from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.evaluation.data import texts
from mcjax.evaluation.report.writer import progress
from mcjax.evaluation.systems.models import Models
from mcjax.runtime import policy_choice
from mcjax.runtime.focus_loop import FocusLoop
from mcjax.runtime.query import Query
from mcjax.runtime.telemetry import Telemetry
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.context_lm import ContextLM

PHASES = ("gist", "lens", "allocate", "fetch", "splice", "decode")
_REFOCUS = ("lens", "allocate", "fetch", "splice")
_QUERY = 64  # tokens of a query
_SHIFT = 4  # refocus steps before the moving query moves on
_NEVER = 1 << 30


def without_stops(lm: BaseLM) -> BaseLM:
  """The base with a tokenizer that has no stop ids: an answer never ends."""
  tokenizer = copy.copy(lm.tokenizer)
  tokenizer.stop_ids = ()
  return dataclasses.replace(lm, tokenizer=tokenizer)


def make_tree(models: Models, folder: pathlib.Path, count: int,
              paths=()) -> MegaContextTree:
  """A tree of `count` tokens of real text, made once and then reopened.

  One that is open stands alone in its folder: a tree has one writer.
  """
  lm, encoder, _ = models
  name = f"{count}-{lm.fingerprint[:8]}-{encoder.fingerprint[:8]}"
  url = str(folder / "trees" / name)
  known = dict(base_fingerprint=lm.fingerprint, base_name=lm.name,
               encoder=encoder)
  if MegaContextTree.exists(url):
    tree = MegaContextTree.open(url, **known)
  else:
    (folder / "trees").mkdir(parents=True, exist_ok=True)
    tree = MegaContextTree.create(
      url, vocab_size=lm.config.vocab_size, **known
    )
  if tree.cursor < count:
    progress(f"ingesting {count:,} tokens")
    ids = texts.tokens(lm.tokenizer, count, paths)[tree.cursor :]
    for a in range(0, len(ids), 1 << 16):
      tree.append(ids[a : a + (1 << 16)])
      tree.commit()
  return tree


def make_loop(models: Models, tree: MegaContextTree, config: Config
              ) -> FocusLoop:
  """The loop over a tree, nothing shown yet; any policy but oracle."""
  lm, encoder, lensnet = models
  choice = policy_choice.choose(config, lm, encoder, lensnet)
  if choice.keyer and tree.lens_fingerprint != choice.keyer.fingerprint:
    tree.rebuild_lens_keys(choice.keyer)
  tree.attach_keyer(choice.keyer)
  return FocusLoop(
    tree, ContextLM.reading(lm, config, encoder),
    choice.policy, encoder, config, Telemetry(),
  )


class LoopArm:
  """The loop in steady state: window full, an edit at every refocus.

  Args:
    models: the base with its networks.
    tree: the history; what is generated is appended and never committed.
    config: of the loop.
    moving: what is asked for moves to another place every few refocus steps.
  """

  def __init__(self, models: Models, tree: MegaContextTree, config: Config,
               moving: bool = False):
    endless = models._replace(lm=without_stops(models.lm))
    self.loop = make_loop(endless, tree, config)
    self._rng = np.random.default_rng(config.seed)
    self._moving = moving
    self._steps = 0
    self.history = tree.cursor
    self.loop.warm_up()
    self._fill(config)
    self.loop.sync()

  def _fill(self, config: Config) -> None:
    """Cold start, then more of the history's text until the window is full."""
    loop, window = self.loop, self.loop.context.window
    loop.cold_start()
    loop.follow()
    loop.settle()
    while window.free >= 2 * BRANCHING:
      count = min(window.free - BRANCHING, config.window // 8)
      start = int(self._rng.integers(0, max(1, self.history - count)))
      loop.append(loop.tree.tokens(start, start + count))

  def decode(self, blocks: int) -> float:
    """Seconds for `blocks` blocks, their refocus steps included."""
    begin = time.perf_counter()
    for _ in range(blocks):
      if self._moving and self._steps % _SHIFT == 0:
        self._move()
      self._steps += 1
      self.loop.decode_block(_NEVER)
    return time.perf_counter() - begin

  def _move(self) -> None:
    tree = self.loop.tree
    start = int(self._rng.integers(0, self.history - _QUERY))
    ids = tree.tokens(start, start + _QUERY)
    self.loop.query = Query(
      ids, np.ones(_QUERY, np.float32), tree.cursor, asked=True)

  def reset(self) -> None:
    """Starts counting anew."""
    self.loop.telemetry.counters.clear()
    self.loop.telemetry.seconds.clear()

  def phases_ms(self) -> dict[str, float]:
    """Milliseconds per decoded token of each phase."""
    t = self.loop.telemetry
    count = max(1, t.counters["decoded_tokens"])
    return {p: 1e3 * t.seconds[p] / count for p in PHASES}

  def refocus_ms(self) -> float:
    """Milliseconds per refocus step that made edits: lens to splice."""
    t = self.loop.telemetry
    seconds = sum(t.seconds[p] for p in _REFOCUS)
    return 1e3 * seconds / max(1, t.counters["refocus_steps"])

  def per_refocus(self, name: str) -> float:
    """A counter per refocus step."""
    counters = self.loop.telemetry.counters
    return counters[name] / max(1, counters["refocus_steps"])

  def close(self) -> None:
    self.loop.tree.close()
