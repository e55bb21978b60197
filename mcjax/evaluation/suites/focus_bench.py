"""What the parts of the focus suite share: settings, text, trees, policies.

A part measures one history or document with one policy at a time and keeps
what came of it as a JSON file in the results' folder; a run that was killed
goes on where it stopped. Ingested histories are kept there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import os
from typing import Any
import uuid

import jax
import numpy as np

from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.evaluation.report.writer import Report, cell, make_folder, progress
from mcjax.evaluation.systems.models import TextSettings
from mcjax.focus.policy import Policy
from mcjax.gist.encoder import GistEncoder, load_gistnet
from mcjax.lens.policy import LensNetPolicy, load_lensnet
from mcjax.pretrained import cards
from mcjax.runtime.megacontext import MegaContext
from mcjax.training.common.data import TokenStore
from mcjax.training.gist import recovery
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError

PARTS = ("planted", "labels", "text", "shift")
_SLICE = 1 << 17  # tokens ingested between two commits


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
  """What is measured.

  Attributes:
    parts: of the suite, see PARTS.
    policies: to compare; the first sets the retriever's budget and leads the
      window whose edits are labelled.
    window: slots.
    seed: of documents, facts, places and candidates.
    history: planted: tokens of each history.
    histories: planted: how many, of different documents.
    needs: planted: facts per history.
    long_history: planted: tokens of one more, long history; 0 skips it.
    long_needs: planted: facts in the long history.
    answers: planted: generate answers too, not only focus.
    answer_tokens: planted: tokens of an answer, the same for every arm.
    in_a_row: planted: one conversation, every exchange joins the history; else
      every question is asked from the same window.
    rounds: planted, in a row: how often every question is asked; the last time
      counts.
    reworded: planted: everyday facts that are asked for in other words, instead
      of made-up ones asked for in their own; the validation split has its own.
    retriever: planted: compare with an embedding retriever.
    documents: labels and text: documents per kind of text.
    document_history: labels and text: tokens before the first step.
    windows: labels: window states per document.
    spacing: labels: refocus steps from one to the next.
    candidates: labels: edits tried per window, half of them collapses.
    horizon: labels: tokens scored after an edit.
    lead: text: tokens that fill the window before scoring begins.
    scored: text: tokens scored.
    shifts: shift: pairs of documents.
    shift_history: shift: tokens before the first document.
    topic: shift: tokens of the first document before the second begins.
  """

  parts: tuple[str, ...] = PARTS
  policies: tuple[str, ...] = ("similarity", "lensnet", "recency", "random",
                               "oracle")
  window: int = 1024
  seed: int = 0
  history: int = 32768
  histories: int = 2
  needs: int = 20
  long_history: int = 0
  long_needs: int = 20
  answers: bool = True
  answer_tokens: int = 48
  in_a_row: bool = False
  rounds: int = 1
  reworded: bool = False
  retriever: bool = True
  documents: int = 2
  document_history: int = 8192
  windows: int = 8
  spacing: int = 4
  candidates: int = 16
  horizon: int = 64
  lead: int = 512
  scored: int = 512
  shifts: int = 8
  shift_history: int = 16384
  topic: int = 2048

  def __post_init__(self):
    wrong = [p for p in self.parts if p not in PARTS]
    if wrong:
      raise McjaxError(
        f"parts: no part {wrong[0]!r}; known: {', '.join(PARTS)}"
      )
    if not self.policies:
      raise McjaxError("policies: name at least one")

  @classmethod
  def quick(cls, **changes) -> Settings:
    """A first look: every part, a little of each, without answers."""
    small: dict[str, Any] = dict(
      policies=("lensnet", "similarity", "recency", "random", "oracle"),
      history=16384,
      histories=1, needs=4, answers=False, retriever=False, documents=1,
      document_history=2048, windows=1, candidates=8, horizon=32, lead=32,
      scored=32, shifts=1, shift_history=8192, topic=1024,
    )
    return cls(**{**small, **changes})


class Bench:
  """A base, held-out text, and a folder that keeps what was measured.

  Args:
    lm: the base.
    stores: held-out documents per kind.
    settings: of the run.
    folder: for results; made if need be.

  Raises:
    McjaxError: the folder cannot be made.
  """

  def __init__(self, lm: BaseLM, stores: Mapping[str, TokenStore],
               settings: Settings, folder: str | os.PathLike):
    self.lm, self.stores, self.settings = lm, stores, settings
    self.folder = make_folder(folder)
    self.encoder: GistEncoder = load_gistnet(lm, settings.gistnet or None)
    # Its keys are written with every history, whoever leads the window.
    self._lensnet = None
    if "lensnet" in settings.policies:
      self._lensnet = self._load_lensnet()
    bos = lm.tokenizer.bos_id
    self._bos = np.array([] if bos is None else [bos], np.int32)

  # --- text and histories -------------------------------------------------

  @property
  def first(self) -> int:
    """Tokens that the loop puts before a text: 1 where the base has a BOS."""
    return len(self._bos)

  def timeline(self, ids: np.ndarray) -> np.ndarray:
    """Ids as the history holds them, the BOS in front where there is one."""
    return np.concatenate([self._bos, ids]).astype(np.int32)

  def tree(self, timeline: np.ndarray) -> str:
    """Place of a tree that holds just these tokens; ingested once.

    In slices, each committed, so that a killed ingest goes on too.
    """
    keys = self._lensnet.keyer.fingerprint if self._lensnet else ""
    key = digest(timeline.tobytes(), self.lm.fingerprint,
                 self.encoder.fingerprint, keys)
    url = str(make_folder(self.folder / "trees") / f"{len(timeline)}-{key}")
    there = MegaContextTree.exists(url)
    make = MegaContext.open if there else MegaContext.create
    with make(*self._known(url)) as mc:
      if mc.cursor < len(timeline):
        progress(f"ingesting {len(timeline):,} tokens")
      while mc.cursor < len(timeline):
        start = mc.cursor or self.first
        mc.ingest_tokens(timeline[start : start + _SLICE])
    return url

  def _known(self, url: str) -> tuple:
    """What `MegaContext` needs to make or open a history here."""
    return (url, self.lm, self.config("recency"), self.encoder, self._lensnet)

  # --- policies -----------------------------------------------------------

  def config(self, policy: str) -> Config:
    """The loop's configuration for a policy."""
    return Config(window=self.settings.window, policy=policy,
                  seed=self.settings.seed)

  def policy(self, name: str) -> Policy:
    """A policy as the loop makes it, with nothing searched yet."""
    if name == "lensnet":
      return self._load_lensnet()
    url = f"memory://{uuid.uuid4()}/tree"
    with MegaContext.create(url, self.lm, self.config(name),
                            self.encoder) as mc:
      return mc._loop._policy

  def _load_lensnet(self) -> LensNetPolicy:
    return load_lensnet(
      self.lm, self.settings.lensnet or None, gistnet=self.encoder)

  @contextlib.contextmanager
  def opened(self, url: str, policy: Policy) -> Iterator[MegaContext]:
    """A history led by `policy`; nothing that is added to it stays.

    The window starts as after an ingest, with the newest tokens as the query.
    """
    mc = MegaContext.open(*self._known(url))
    mc._loop._policy = policy
    mc._loop.cold_start()
    mc._loop.follow()
    try:
      yield mc
    finally:
      mc.tree.close()

  # --- what is kept -------------------------------------------------------

  def kept(self, name: str, key: Mapping, make: Callable[[], dict]) -> dict:
    """What `make` returned for this key, from `name`.json if it is there.

    Args:
      name: of the file, without its ending.
      key: everything the outcome depends on, plain JSON; base and GistNet are
        added.
      make: measures; its outcome is plain JSON.
    """
    whole = {
      **key, "base": self.lm.fingerprint, "gistnet": self.encoder.fingerprint,
      "dtype": str(self.lm.params["embed"].dtype),
      "window": self.settings.window, "seed": self.settings.seed,
      "card": cards.reading(self.lm.name), "data": self.settings.data,
      "split": self.settings.split,
    }
    return cell(self.folder, name, whole, make)


def identity(policy: Policy | None) -> str:
  """A digest of a policy's weights; empty for one without."""
  leaves = jax.tree.leaves(getattr(policy, "params", ()))
  return digest(*(np.asarray(a).tobytes() for a in leaves)) if leaves else ""


def digest(*parts: bytes | str) -> str:
  """12 hexadecimal digits that stand for these parts."""
  out = hashlib.blake2b(digest_size=6)
  for part in parts:
    out.update(part.encode() if isinstance(part, str) else part)
  return out.hexdigest()


def history_of(stores: Mapping[str, TokenStore], length: int, number: int,
               seed: int) -> np.ndarray:
  """`length` tokens of held-out documents, of every kind in turn.

  A document gives at most a quarter of the history. Where the store is too
  small, its documents come again in another order.

  Raises:
    McjaxError: the stores hold no text.
  """
  rng = np.random.default_rng([seed, number])
  orders: dict[str, list[int]] = {kind: [] for kind in sorted(stores)}
  pieces: list[np.ndarray] = []
  size = 0
  while size < length:
    before = size
    for kind, order in orders.items():
      if not order:
        order.extend(rng.permutation(len(stores[kind].names)).tolist())
      if order and size < length:
        piece = stores[kind].document(order.pop(0))[: max(1, length // 4)]
        pieces.append(np.asarray(piece, np.int32))
        size += len(piece)
    if size == before:
      raise McjaxError("the held-out documents hold no text; run "
                       "tools/prepare_data")
  return np.concatenate(pieces)[:length]


def add_mean(report: Report, name: str, values, unit: str,
             digits: int = 3) -> str:
  """Adds a mean with its 95 % interval over documents; returns them as text.

  Args:
    report: gets `name`, `name/low` and `name/high`.
    name: of the figure.
    values: one a document.
    unit: of the figure.
    digits: of the text.
  """
  array = np.asarray(values, np.float64)
  return add_interval(report, name, lambda rows: float(array[rows].mean()),
                      len(array), unit, digits)


def add_forwarded(report: Report, prefix: str, cells: Sequence[Mapping]
                  ) -> float | None:
  """Adds PREFIX/tokens forwarded, the mean of cells that counted them.

  Returns:
    The mean; None where a cell was kept by a version that did not count.
  """
  counts = [c["forwarded"] for c in cells if "forwarded" in c]
  if len(counts) < len(cells):
    return None
  mean = float(np.mean(counts))
  report.add(f"{prefix}/tokens forwarded", mean, "tokens")
  return mean


def add_interval(report: Report, name: str, statistic, documents: int,
                 unit: str, digits: int = 3) -> str:
  """As `add_mean`, of any statistic of the documents' row numbers."""
  value = statistic(np.arange(documents))
  low, high = recovery.interval(statistic, documents, draws=1000)
  return report.add_interval(
    name, value, low, high, unit, digits, n=documents)
