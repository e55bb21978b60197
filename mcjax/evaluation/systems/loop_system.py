"""MegaContext as one of the systems that are compared."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import pathlib
import time

import numpy as np

from mcjax.config import Config
from mcjax.evaluation.report.writer import make_folder, progress
from mcjax.evaluation.systems.known_places import KnownPlaces
from mcjax.evaluation.systems.models import Models
from mcjax.evaluation.systems.system import (
  Look,
  Reply,
  Spans,
  difference,
  merged,
  runs,
)
from mcjax.runtime import policy_choice
from mcjax.runtime.megacontext import MegaContext
from mcjax.tree.tree import MegaContextTree
from mcjax.types import Entry, McjaxError

_SLICE = 1 << 17  # tokens ingested between two commits


class LoopSystem:
  """The loop under a policy; policy oracle is told where the evidence is.

  Args:
    name: see `System`.
    models: the base, its GistNet and LensNet.
    config: of the loop; policy "oracle" stands for `KnownPlaces`.
    trees: folder that keeps ingested histories, for every policy.
  """

  def __init__(self, name: str, models: Models, config: Config,
               trees: pathlib.Path):
    self.name = name
    self._places: KnownPlaces | None = None
    if config.policy == "oracle":
      self._places = KnownPlaces()
      config = dataclasses.replace(config, policy="recency")
    self._models, self._config, self._trees = models, config, trees
    self._mc: MegaContext | None = None
    self._length = self._first = 0
    self._view: Spans = ()

  # --- the history --------------------------------------------------------

  def ingest(self, ids: np.ndarray) -> None:
    self.close()
    url = kept_tree(self._trees, self._models, self._config, ids)
    self._mc = mc = self._models.open(url, self._config)
    if self._places is not None:
      mc._loop._policy = self._places
    mc._loop.cold_start(mc.config.recent_tokens)
    mc._loop.follow()
    mc._loop.warm_up()
    self._first = mc.cursor - len(ids)  # 1 where the base has a BOS
    self._length = len(ids)
    self._view = self._raw(mc.focus())

  def close(self) -> None:
    if self._mc is not None:  # what was said is not kept in the tree
      self._mc.tree.close()
      self._mc = None

  # --- what it sees and says ----------------------------------------------

  def look(self, question: str, *, budget: int | None = None,
           evidence: Spans = ()) -> Look:
    del budget
    mc = self._tell(evidence)
    with mc._loop.undone():
      before = mc.telemetry.counters["edits"]
      mc._loop.append(mc._turn(question).ids)
      mc._loop.settle()
      mc._loop.attend()
      return self._look(mc.focus(), mc._loop.sources,
                        mc.telemetry.counters["edits"] - before)

  def answer(self, question: str, limit: int, *, evidence: Spans = (),
             remember: bool = False) -> Reply:
    mc = self._tell(evidence)
    context, counters = mc._loop.context, mc.telemetry.counters
    before, edits = context.tokens_run, counters["edits"]
    begin = time.perf_counter()
    with self._remembered(mc, remember):
      out = mc._generate(question, limit)
    seconds = time.perf_counter() - begin
    sources = [(s.start, s.stop) for s in out.sources]
    if mc._loop._config.raw_attention == "all":
      sources = []
    seen = self._look(out.focus, sources, counters["edits"] - edits)
    if remember:
      self._view = seen.view
    return Reply(out.text, seen, context.tokens_run - before, seconds,
                 out.answerable)

  def nll(self, ids: np.ndarray) -> np.ndarray:
    return self._open._loop.score(np.asarray(ids, np.int32))

  @property
  def forwarded(self) -> int:
    """Tokens that the base ran on since the history was taken in."""
    return self._open._loop.context.tokens_run

  @property
  def _open(self) -> MegaContext:
    if self._mc is None:
      raise McjaxError(f"system {self.name} has no history: call ingest")
    return self._mc

  def _tell(self, evidence: Spans) -> MegaContext:
    if self._places is not None:
      self._places.places = tuple(
        (a + self._first, b + self._first) for a, b in evidence)
    return self._open

  @contextlib.contextmanager
  def _remembered(self, mc: MegaContext, remember: bool) -> Iterator[None]:
    with contextlib.nullcontext() if remember else mc._loop.undone():
      yield

  def _look(self, focus: list[Entry], sources, edits: int) -> Look:
    view = self._raw(focus)
    read = view
    if sources:
      raw = set(t for a, b in view for t in range(a, b))
      read = runs(np.array(sorted(
        t for a, b in sources for t in range(a - self._first, b - self._first)
        if t in raw), np.int64)) or view  # none of it raw: all is read
    brought, put_away = difference(self._view, view)
    return Look(view, merged(read), edits, brought, put_away)

  def _raw(self, focus: list[Entry]) -> Spans:
    """Spans of the history at L0 in a tiling."""
    tokens = np.array([e.start for e in focus if e.level == 0], np.int64)
    tokens -= self._first
    return runs(tokens[(tokens >= 0) & (tokens < self._length)])


def kept_tree(folder: pathlib.Path, models: Models, config: Config,
              ids: np.ndarray) -> str:
  """Place of a tree with just these tokens; ingested once, in slices."""
  config = dataclasses.replace(config, policy="recency")
  digest = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=6)
  digest.update(identity(models, config).encode())
  url = str(make_folder(folder) / f"{len(ids)}-{digest.hexdigest()}")
  there = MegaContextTree.exists(url)
  with (models.open if there else models.create)(url, config) as mc:
    first = 0 if models.lm.tokenizer.bos_id is None else 1
    if mc.cursor < len(ids):
      progress(f"ingesting {len(ids):,} tokens")
    while mc.cursor < len(ids) + first:
      start = max(0, mc.cursor - first)
      mc.ingest_tokens(ids[start : start + _SLICE])
  return url


def identity(models: Models, config: Config) -> str:
  """Stands for all weights that a history is written and led with."""
  choice = policy_choice.choose(config, *models)
  parts = [models.lm.fingerprint, models.encoder.fingerprint]
  if choice.keyer is not None:
    parts.append(choice.keyer.fingerprint)
  return " ".join(parts)
