"""Counterfactual labels: what it is worth to have a block in full detail.

Windows are reached by following a task with a focus policy. In each, some
blocks are labelled with their worth: the mean NLL of the true continuation
without the block's raw tokens minus with them, found by trying the edit
(`counterfactual.edit_losses`). Raw blocks also get the cheap estimate from one
backward pass (`counterfactual.slot_gradients`).

A data set is a folder of one file per task. It keeps tokens, not gists, so
that it outlives the GistNet; files present are not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
import pathlib
from typing import Any
import uuid

import jax
import numpy as np

from mcjax.config import Config
from mcjax.focus import allocator as focus_allocator
from mcjax.focus.controls import Recency
from mcjax.focus.policy import Policy
from mcjax.focus.similarity import Similarity
from mcjax.lens import features as lens_rows
from mcjax.lens.features import BURIED, GIST, RAW, Rows
from mcjax.parallel import processes
from mcjax.runtime.focus_loop import FocusLoop, Query
from mcjax.runtime.telemetry import Telemetry
from mcjax.training.lens.tasks import Task
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window import counterfactual
from mcjax.window.context_lm import ContextLM
from mcjax.window.counterfactual import Candidate
from mcjax.window.focus_view import FocusView
from mcjax.window.working_context import COLLAPSE, EXPAND

_ROWS = 96  # kept per window


@dataclasses.dataclass(frozen=True)
class LabelConfig:
  """How windows are reached and labelled.

  Attributes:
    window: W.
    horizon: H, tokens of the continuation.
    windows: labelled windows per start of a task.
    gap: blocks between them.
    raw, found, chance: labelled blocks of a window at most: raw ones, ones
      that token statistics find, and random ones.
    together: candidates run in one batch.
  """

  window: int = 1024
  horizon: int = 32
  windows: int = 3
  gap: int = 3
  raw: int = 10
  found: int = 6
  chance: int = 4
  together: int = 4


@dataclasses.dataclass
class Labelled:
  """One window; R rows.

  Attributes:
    kind: of the task.
    ids, state, distance, query_ids, query_weights, query_rarity, newest_ids,
      newest_rarity, asked: see `lens.features.LensInputs`.
    tail: [TAIL_GISTS + 1, D] float16 the tail's gists.
    tail_mask: [TAIL] bool.
    worth: [R] float32 nats a token; NaN where not labelled.
    cheap: [R] float32 first-order estimate; NaN for other than raw blocks.
    pinned: [R] bool, the block may not be collapsed.
    answers: [R] bool, the block holds part of the asked fact.
  """

  kind: str
  ids: np.ndarray
  state: np.ndarray
  distance: np.ndarray
  query_ids: np.ndarray
  query_weights: np.ndarray
  query_rarity: np.ndarray
  newest_ids: np.ndarray
  newest_rarity: np.ndarray
  asked: np.ndarray
  tail: np.ndarray
  tail_mask: np.ndarray
  worth: np.ndarray
  cheap: np.ndarray
  pinned: np.ndarray
  answers: np.ndarray


class Labeller:
  """Labels windows of tasks.

  Args:
    lm: the frozen base.
    encoder: its GistNet.
    config: see `LabelConfig`.
    policy: follows the tasks; None takes similarity and recency in turn.
  """

  def __init__(self, lm, encoder, config: LabelConfig,
               policy: Policy | None = None, keyer=None):
    self._lm, self._encoder, self._config = lm, encoder, config
    self._policy: Policy | None = policy
    self._keyer = keyer
    self._loop_config = Config(window=config.window)
    self._context = ContextLM.reading(lm, self._loop_config, encoder)
    self._context.warm_up()

  def label(self, task: Task, number: int) -> list[Labelled]:
    """Every labelled window of a task; `number` seeds the choices."""
    rng = np.random.default_rng([77, number])
    out = []
    for start in task.starts:
      loop, tree = self._loop(task, start, number)
      try:
        if task.kind == "ask":
          out += self._ask(loop, task, rng)
        else:
          out += self._follow(loop, task, start, rng)
      finally:
        tree.close()
    return out

  def _loop(self, task: Task, start: int, number: int):
    tree = MegaContextTree.create(
      f"memory://{uuid.uuid4()}/labels",
      base_fingerprint=self._lm.fingerprint, base_name=self._lm.name,
      encoder=self._encoder,
      vocab_size=self._lm.config.vocab_size, keyer=self._keyer,
    )
    tree.append(task.ids[:start])
    self._context.window.retile([])
    policy = self._policy or (
      Recency() if number // 6 % 4 == 3
      else Similarity(self._loop_config.search_nodes))
    loop = FocusLoop(tree, self._context, policy, self._encoder,
                     self._loop_config, Telemetry())
    return loop, tree

  def _follow(self, loop: FocusLoop, task: Task, start: int, rng):
    recent = int(rng.choice([256, 384, 512]))
    loop.cold_start(recent)
    loop.follow()
    loop.settle()
    out, at = [], start
    for k in range(self._config.windows * self._config.gap):
      ahead = task.ids[at : at + self._config.horizon]
      if len(ahead) < self._config.horizon:
        break
      loop.follow()
      if k % self._config.gap == 0:
        self._sync(loop)
        out.append(self._window(loop, task, ahead, rng))
      loop.refocus(need=BRANCHING)
      loop.append(task.ids[at : at + BRANCHING])
      self._sync(loop, BRANCHING + 1)
      at += BRANCHING
    return out

  def _ask(self, loop: FocusLoop, task: Task, rng):
    loop.cold_start(int(rng.choice([256, 384])))
    tokenizer = self._lm.tokenizer
    if tokenizer.has_chat_template:
      prompt, own = tokenizer.chat_turn(task.question, first=False)
    else:
      prompt = tokenizer.encode(task.question)
      own = np.ones(len(prompt), bool)
    answer = tokenizer.encode(task.answer)[: self._config.horizon]
    words = prompt[own]
    loop.query = Query(words, np.ones(len(words), np.float32),
                       loop.tree.cursor, asked=True)
    loop.append(prompt)
    out = []
    for steps in (0, 1, 4):  # as asked, after one step, and settled
      for _ in range(steps):
        loop.refocus(need=BRANCHING)
      self._sync(loop)
      out.append(self._window(loop, task, answer, rng))
    return out

  def _sync(self, loop: FocusLoop, renew: int = 1) -> None:
    loop.sync(renew=renew)

  def _rows(self, loop: FocusLoop, task: Task, rng):
    """The window as a policy sees it, and rows for all it could look at.

    Returns:
      the view, rows, blocks that token statistics find, and the task's own.
    """
    c, window, tree = self._config, loop.context.window, loop.tree
    view = FocusView(
      entries=window.entries, tree=tree, query_ids=loop.query.ids,
      query_weights=loop.query.weights, query_start=loop.query.start,
      asked=loop.query.asked, step=loop.step, pressure=False,
      context_lm=loop.context)
    finder = Similarity(1024, spans=c.found)
    found = [b for b, _ in finder.targets(view)]
    last = loop.query.start // BRANCHING
    truth = []
    if task.place is not None:
      truth = list(range(task.place[0] // BRANCHING,
                         (task.place[1] - 1) // BRANCHING + 1))
    chance = rng.integers(0, max(1, last), 3 * c.chance).tolist()
    wanted = list(dict.fromkeys(truth + found + chance))
    return view, lens_rows.window_rows(window, wanted), found, truth

  def _window(self, loop: FocusLoop, task: Task, ahead: np.ndarray, rng
              ) -> Labelled:
    c, window, tree = self._config, loop.context.window, loop.tree
    config = self._loop_config
    view, rows, found, truth = self._rows(loop, task, rng)
    legal = focus_allocator.legal_edits(
      window, step=loop.step, cooldown=0, sink=config.sink_tokens,
      protect=config.protect_tokens)
    candidates, labelled = self._choose(rows, legal, truth, found, rng)
    base, losses = counterfactual.edit_losses(
      loop.context, tree, candidates, ahead, pad_to=c.together,
      together=c.together)
    worth = np.full(len(rows), np.nan, np.float32)
    sign = np.where(rows.state[labelled] == RAW, 1.0, -1.0)
    worth[labelled] = sign * (losses - base)
    slopes = counterfactual.slot_gradients(loop.context, tree, ahead)
    cheap = np.full(len(rows), np.nan, np.float32)
    raw = rows.state == RAW
    cheap[raw] = [slopes[a : a + BRANCHING].sum() for a in rows.entry[raw]]
    keep = self._kept(rows, labelled, rng)
    rows = Rows(*(a[keep] for a in rows))
    inputs = lens_rows.gather(
      view, rows, len(rows), loop.context.token_embeddings, self._encoder)
    pinned = (rows.state == RAW) & ~legal.collapse[rows.entry]
    return Labelled(
      task.kind, inputs.ids, inputs.state, inputs.distance, inputs.query_ids,
      inputs.query_weights, inputs.query_rarity, inputs.newest_ids,
      inputs.newest_rarity, inputs.asked,
      inputs.tail[: lens_rows.TAIL_GISTS + 1].astype(np.float16),
      inputs.tail_mask, worth[keep], cheap[keep], pinned,
      np.isin(rows.block, truth))

  def _choose(self, rows: Rows, legal, truth, found, rng):
    """Candidates and the rows they label."""
    c = self._config
    raw = np.flatnonzero((rows.state == RAW) & legal.collapse[rows.entry])
    hidden = np.flatnonzero(rows.state != RAW)
    first = np.flatnonzero(np.isin(rows.block, truth))
    asked = hidden[np.isin(rows.block[hidden], found)][: c.found]
    others = rng.permutation(np.setdiff1d(hidden, asked))
    gist = others[rows.state[others] == GIST][: c.chance]
    buried = others[rows.state[others] == BURIED][: c.chance]
    raw = np.concatenate([np.intersect1d(raw, first),
                          rng.permutation(np.setdiff1d(raw, first))])[: c.raw]
    first = first[rows.state[first] != RAW]
    picked = np.unique(np.concatenate([raw, first, asked, gist, buried]))
    candidates = [
      Candidate(COLLAPSE, int(rows.entry[r])) if rows.state[r] == RAW
      else Candidate(EXPAND, int(rows.entry[r]), int(rows.block[r]))
      for r in picked]
    return candidates, picked

  def _kept(self, rows: Rows, labelled, rng) -> np.ndarray:
    """Rows stored: labelled and raw ones first, then random others."""
    first = np.union1d(labelled, np.flatnonzero(rows.state == RAW))
    others = rng.permutation(np.setdiff1d(np.arange(len(rows)), first))
    return np.sort(np.concatenate([first, others])[:_ROWS])


def write(path: pathlib.Path, windows: list[Labelled]) -> None:
  """Writes the windows of one task, atomically."""
  arrays: dict[str, Any] = {}
  for i, window in enumerate(windows):
    for field in dataclasses.fields(window):
      arrays[f"{i}.{field.name}"] = np.asarray(getattr(window, field.name))
  partial = path.with_suffix(".partial.npz")
  np.savez_compressed(partial, **arrays)
  partial.replace(path)


def read(path: pathlib.Path) -> list[Labelled]:
  """Reads what `write` wrote."""
  with np.load(path) as arrays:
    count = len({name.split(".")[0] for name in arrays})
    names = [f.name for f in dataclasses.fields(Labelled)][1:]
    return [
      Labelled(str(arrays[f"{i}.kind"]), *(arrays[f"{i}.{n}"] for n in names))
      for i in range(count)]


def _path(folder: pathlib.Path, task: int) -> pathlib.Path:
  return folder / f"{task:06d}.npz"


def make(folder, labeller: Labeller, tasks, count: int, first: int = 0,
         settings: dict | None = None) -> Iterator[int]:
  """Labels tasks `first` to `first + count`; what is in `folder` is kept.

  Many processes share the tasks that are missing, and take one each at a time,
  so that all of them can stop together. All see one folder.

  Yields:
    as often in every process: how many tasks are labelled.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if settings is not None and processes.is_first():
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))
  processes.barrier("labelling begins")
  missing = [n for n in range(first, first + count)
             if not _path(folder, n).exists()]
  processes.barrier("all know what is missing")
  many = jax.process_count()
  for start in range(0, len(missing), many):
    for number in missing[start:][jax.process_index() : many : many]:
      write(_path(folder, number), labeller.label(tasks.task(number), number))
    processes.barrier("one task each is labelled")
    yield count - len(missing) + min(start + many, len(missing))


def read_tasks(folder, count: int, first: int = 0
               ) -> Iterator[tuple[int, list[Labelled]]]:
  """(number, windows) of tasks that `make` has labelled, in order."""
  for number in range(first, first + count):
    yield number, read(_path(pathlib.Path(folder), number))
