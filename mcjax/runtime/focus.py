"""Focus: one history's window, and what of the history it shows.

Assemble, score, allocate, splice: the window is tiled, refocused by the
policy's scores, and brought up to date in the LM. `focus_loop` runs the LM on
it.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib

import jax
import numpy as np

from mcjax.config import Config
from mcjax.focus import allocator as focus_allocator
from mcjax.focus.policy import Policy
from mcjax.gist.encoder import GistEncoder
from mcjax.runtime import answer_attention
from mcjax.runtime.query import Query
from mcjax.runtime.telemetry import Telemetry, compile_count, peak_memory_mib
from mcjax.runtime.warm_up import WarmUp, programs_of
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING, McjaxError
from mcjax.window import invariants
from mcjax.window.context_lm import ContextLM
from mcjax.window.focus_view import FocusView, fading_weights
from mcjax.window.working_context import (
  EXPAND,
  Entries,
  cold_start,
)

_LAYERS = 8  # a base of no more compiles soon enough in a first call
_QUERY = 64  # newest tokens that act as the query where there is no prompt


class Focus:
  """One history, one window, one policy.

  Attributes:
    tree: the history.
    context: the LM's window.
    telemetry: counters and records.
    query: set by the caller for a prompt, or by `follow` from newest tokens.
    sources: token spans of the sentences that the LM answers from; empty where
      it attends to all raw text.
    found: token spans that answer the question, attended to or not.
    answerable: how surely the history answers it, in [0, 1].
    step: refocus steps so far.
  """

  def __init__(self, tree: MegaContextTree, context: ContextLM,
               policy: Policy, encoder: GistEncoder, config: Config,
               telemetry: Telemetry):
    self.tree = tree
    self.context = context
    self.telemetry = telemetry
    self.query = Query(np.zeros(0, np.int32), np.zeros(0, np.float32), 0)
    self.sources: list[tuple[int, int]] = []
    self.found: list[tuple[int, int]] = []
    self.answerable = 0.0
    self.step = 0
    self.context.window.forgotten = tree.journal.forgotten
    self._policy = policy
    self._encoder = encoder
    self._config = config
    self._key = jax.random.key(config.seed)
    self._warm = False
    self._compiling: contextlib.AbstractContextManager = (
      contextlib.nullcontext())
    self._expanded = False  # since the LM last ran
    self._deeper = False  # the last refocus step expanded something

  # --- what it shows ------------------------------------------------------

  def show(self, count: int) -> None:
    """Shows the newest `count` tokens of the tree in the window.

    At L0 if they fit the free slots, else the whole history is retiled by
    distance, with these at L0 as far as half of the window.
    """
    window = self.context.window
    if not count:
      return
    if count <= window.free:
      window.append_tokens(window.take_slots(count))
    else:
      self.cold_start(count)
      self._policy.take_in(self.tree, self.context)

  def cold_start(self, least: int = 0) -> None:
    """Retiles the whole history by distance only.

    The whole window is used: what gists leave free holds the newest tokens,
    unless `Config.recent_tokens` says how many.

    Args:
      least: newest tokens that are shown raw in any case, up to half a window.

    Raises:
      McjaxError: the window cannot hold the coarsest tiling.
    """
    config, window = self._config, self.context.window
    room = config.window
    half = config.window // (2 * BRANCHING) * BRANCHING
    recent = max(config.recent_tokens or BRANCHING, min(least, half))
    per_level = config.gists_per_level
    if not config.recent_tokens:  # no more than the LM sees
      per_level = min(per_level, self.context.gists_wanted)
    nodes = self._tiling(recent, per_level)
    while len(nodes) > room and (per_level or recent > BRANCHING):
      per_level //= 2
      recent = max(BRANCHING, recent // 2) if per_level == 0 else recent
      nodes = self._tiling(recent, per_level)
    if len(nodes) > room:
      raise McjaxError(
        f"config.window {config.window} is too small for a history of "
        f"{self.tree.cursor} tokens"
      )
    if not config.recent_tokens:
      nodes = self._filled(nodes, recent, per_level)
    window.retile(nodes)
    if config.kv == "exact":
      self.context.forget()

  def _tiling(self, recent: int, per_level: int) -> list[tuple[int, int]]:
    return cold_start(
      self.tree.cursor, self.tree.top_level, sink=self._config.sink_tokens,
      recent=recent, per_level=per_level,
    )

  def _filled(self, nodes: list[tuple[int, int]], recent: int, per_level: int
              ) -> list[tuple[int, int]]:
    """The tiling with as much more raw text as the window has room for."""
    room = self._config.window
    for more in range(room, recent, -BRANCHING):
      longer = self._tiling(more, per_level)
      if len(longer) <= room:
        return longer
    return nodes

  def follow(self) -> None:
    """Makes the newest tokens of the history the query."""
    start = max(0, self.tree.cursor - _QUERY)
    ids = self.tree.tokens(start, self.tree.cursor)
    self.query = Query(ids, fading_weights(len(ids)), start)
    self.attend()

  def forget(self) -> None:
    """Hides what the tree's journal says is forgotten.

    Keys and values are computed anew: what was read beside it has seen it.
    """
    self.context.window.forgotten = self.tree.journal.forgotten
    self.context.forget()
    self.follow()

  # --- refocusing ---------------------------------------------------------

  def refocus_deeper(self, continuation: np.ndarray | None = None) -> int:
    """A refocus step, and further ones while they expand.

    The way to a block leads through its coarse parents, and one step's edits
    may not pay for all of it; 32 tokens later, with another query, the wish
    has often passed. So there are as many steps as the tree has levels, that of
    raw tokens included.

    Returns:
      The edits applied.
    """
    edits = 0
    for _ in range(self.tree.top_level + 1):
      edits += self.refocus(BRANCHING, continuation)
      if not self._deeper:
        break
    return edits

  def settle(self) -> None:
    """Refocuses until nothing changes, at most `settle_steps` times.

    What an earlier prompt brought in may be barred from leaving at first, so
    nothing changing counts only once the cooldown is over.
    """
    for step in range(self._config.settle_steps):
      if not self.refocus(need=BRANCHING) and step >= self._config.cooldown:
        break

  def refocus(self, need: int, continuation: np.ndarray | None = None) -> int:
    """One refocus step: score, allocate, apply. The LM runs at `sync`.

    Args:
      need: slots that must be free afterwards, if collapses can free them.
      continuation: [H] true next tokens where they are known.

    Returns:
      The edits applied.
    """
    window, config = self.context.window, self._config
    legal = self._legal_edits()
    view = self.view(need, legal, continuation)
    with self.telemetry.phase("lens"):
      scores = self._policy.score(view)
    seen = _seen(view.entries, scores) if self.telemetry.detailed else {}
    with self.telemetry.phase("allocate"):
      plan = focus_allocator.plan_edits(
        scores, legal, free=window.free, need=need,
        threshold=config.threshold, max_edits=config.max_edits,
      )
      edits = focus_allocator.apply_plan(window, plan, self.step)
    self.step += 1
    self._deeper = any(action == EXPAND for action, *_ in edits)
    self._expanded |= self._deeper
    self._record(edits, seen)
    every = config.refresh_every
    rebuild = config.kv == "exact" and edits
    if rebuild or every and self.step % every == 0:
      self.context.forget()
    self.check()
    return len(edits)

  def view(self, need: int = BRANCHING,
           legal: focus_allocator.Legal | None = None,
           continuation: np.ndarray | None = None) -> FocusView:
    """What the policy sees now; arguments as of `refocus`."""
    window, query = self.context.window, self.query
    legal, count = legal or self._legal_edits(), len(window.entries)
    return FocusView(
      entries=window.entries, tree=self.tree, query_ids=query.ids,
      query_weights=query.weights, query_start=query.start,
      asked=query.asked, step=self.step,
      can_expand=legal.expand[:count], can_collapse=legal.collapse[:count],
      room=window.free - need, max_edits=self._config.max_edits,
      context_lm=self.context, continuation=continuation,
      query_before=query.before,
    )

  def _legal_edits(self) -> focus_allocator.Legal:
    config, protect = self._config, self._config.protect_tokens
    if self.query.asked:  # the text before a question can be as far from it
      protect = min(protect, self.tree.cursor - self.query.start)
    return focus_allocator.legal_edits(
      self.context.window, step=self.step, cooldown=config.cooldown,
      sink=config.sink_tokens, protect=protect,
    )

  def attend(self) -> None:
    """Lets the LM attend to what answers the question; see `raw_attention`.

    Until the answer ends; see `answer_attention`.
    """
    context, query = self.context, self.query
    now = answer_attention.attend(
      query, self._policy, self._config, context.window.entries, self.tree,
      context.lm.tokenizer)
    self.sources, self.found, self.answerable = (
      now.sources, now.found, now.answerable)
    if context.attend(now.attention) and self._config.kv == "exact":
      context.forget()

  def sync(self, renew: int = 1) -> None:
    """Fetches inputs and runs the LM on what it has not seen; see ContextLM.

    After an expand the newest `Config.renew_tokens` before the `renew` asked
    for are run again too: what they attended to lacked the new detail.
    """
    before = self.context.tokens_run
    if self._expanded:
      renew += self._config.renew_tokens - 1
      self._expanded = False
    with self.telemetry.phase("fetch"):
      self.context.load_unready(self.tree)
    with self.telemetry.phase("splice"):
      self.context.sync(renew)
      self.context.wait()
    self.telemetry.count("lm_tokens", self.context.tokens_run - before)

  def _make_room(self, need: int,
                 continuation: np.ndarray | None = None) -> bool:
    """Collapses until `need` slots are free; whether anything changed."""
    window, changed = self.context.window, False
    while window.free < need:
      if not self.refocus(need=need, continuation=continuation):
        before = window.free
        self.cold_start()
        if window.free <= before:
          raise McjaxError(
            f"config.window {self._config.window} is too small: {need} are "
            f"needed, {window.free} slots can be freed"
          )
      changed = True
    return changed

  def rest(self) -> None:
    """Brings a window that holds an unfinished block too back to its budget.

    Between two calls of a user it has `Config.window` entries at most.
    """
    self._make_room(BRANCHING)
    self.check()

  def _due(self) -> bool:
    return self.tree.cursor % self._config.refocus_every == 0

  # --- housekeeping -------------------------------------------------------

  def saved_focus(self) -> dict:
    """The focus as small JSON, for `restore_focus`."""
    return {"runs": self.context.window.runs(), "step": self.step}

  def restore_focus(self, saved: dict | None) -> None:
    """Takes up a saved focus, or a cold start where it does not fit."""
    self.step = int(saved["step"]) if saved else 0
    fits = saved is not None and self.context.window.restore_runs(
      saved["runs"], self.tree.cursor
    )
    if not fits and self.tree.cursor:
      self.cold_start()

  def check(self) -> None:
    """Checks every invariant if the configuration asks for it."""
    if not self._config.check_invariants:
      return
    window = self.context.window
    invariants.check_window(
      window, self.tree.cursor, max_level=self.tree.top_level,
      sink=self._config.sink_tokens,
    )
    invariants.check_positions(
      window, self.context.gist_stride, self.context.lm.config.max_positions
    )

  def warm_up(self) -> None:
    """Compiles every shape once, so that nothing compiles in the loop."""
    if not self._warm:
      self._warm = True
      for _ in self._programs(self.context):
        pass

  def warm_up_beside(self) -> contextlib.AbstractContextManager:
    """As `warm_up`, for one call; that of a large base waits for little.

    Only what this call uses is compiled, the rest in a thread, see `WarmUp`.
    """
    lm = self.context.lm
    split = len(lm.params["embed"].devices()) > 1  # its threads would meet
    if self.context.is_alone and lm.config.n_layers > _LAYERS and not split:
      if not self._warm:
        self._warm, twin = True, self.context.twin()
        self._compiling = WarmUp(lambda: self._programs(twin))
      return self._compiling
    self.warm_up()
    return contextlib.nullcontext()

  def stop_compiling(self) -> None:
    """Lets a thread that still compiles end soon."""
    if isinstance(self._compiling, WarmUp):
      self._compiling.stop()

  def _programs(self, context: ContextLM) -> Iterator[None]:
    return programs_of(
      context, self._config, self._encoder, self._policy,
      reads_little=self.tree.cursor >= BRANCHING)

  def spans(self) -> dict[str, list]:
    """The focus for a record, blocks of raw tokens as one."""
    return _seen(self.context.window.entries)

  def _record(self, edits: list[tuple[int, int, int]], seen: dict) -> None:
    t, e = self.telemetry, self.context.window.entries
    expands = sum(action == EXPAND for action, *_ in edits)
    t.count("refocus_steps")
    t.count("edits", len(edits))
    t.count("expands", expands)
    t.count("collapses", len(edits) - expands)
    t.count("nodes_touched", self._policy.touched)
    t.count("bytes_read", self._policy.bytes_read)
    if edits:
      self.tree.record_access(*_entered(edits))
    covered = np.bincount(e.level, weights=e.width())
    t.record(
      "refocus", step=self.step, cursor=self.tree.cursor,
      edits=[[int(x) for x in edit] for edit in edits],
      utilisation=len(e) / self._config.window,
      residency=(covered / max(1.0, covered.sum())).round(6).tolist(),
      nodes_touched=self._policy.touched, lm_tokens=self.context.tokens_run,
      compiles=compile_count(), seconds=self.telemetry.lap(),
      swap_rate=t.swap_rate, peak_memory_mib=peak_memory_mib(), **seen,
    )


def _seen(entries: Entries, scores=None) -> dict[str, list]:
  """"spans": [level, start, stop] of the entries, with "scores" if given.

  Raw tokens of a block are one span, whose score is their mean.
  """
  block = np.where(entries.level == 0, entries.index // BRANCHING,
                   entries.index)
  new = (np.diff(entries.level) != 0) | (np.diff(block) != 0)
  first = np.concatenate([[0], np.flatnonzero(new) + 1])[: len(entries)]
  last = np.append(first[1:], len(entries)) - 1
  start, stop = entries.start(), entries.start() + entries.width()
  out = {"spans": np.stack(
    [entries.level[first], start[first], stop[last]], 1).tolist()}
  if scores is not None and len(first):
    means = np.add.reduceat(np.asarray(scores, np.float64)[: len(entries)],
                            first) / (last - first + 1)
    out["scores"] = means.round(3).tolist()
  return out


def _entered(edits) -> tuple[np.ndarray, np.ndarray]:
  """Levels and indices of the nodes that edits brought into the window."""
  nodes = []
  for action, level, index in edits:
    if action == EXPAND:
      nodes += [(level - 1, index * BRANCHING + k) for k in range(BRANCHING)]
    else:
      nodes.append((level, index))
  levels, indices = np.array(nodes, np.int64).T
  return levels, indices
