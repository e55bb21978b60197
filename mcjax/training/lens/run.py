"""A whole LensNet run: windows by construction, then training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
import pathlib
from typing import Any, cast

from etils import epath
import jax
import numpy as np
import tqdm

from mcjax.base.load import BaseLM
from mcjax.base.tokenizer import Tokenizer
from mcjax.gist.encoder import GistEncoder
from mcjax.lens import network as lensnet
from mcjax.lens.keyer import LensKeyer
from mcjax.lens.policy import LensNetPolicy
from mcjax.parallel import processes
from mcjax.parallel.places import place
from mcjax.settings import read_fields
from mcjax.training.common.data import TokenStore
from mcjax.training.lens import questions
from mcjax.training.lens.effects import Effects
from mcjax.training.lens.histories import TextHistories
from mcjax.training.lens.losses import LensObjective
from mcjax.training.lens.prompts import LENGTH, History
from mcjax.training.lens.trainer import LensTrainConfig, LensTrainer, evaluate
from mcjax.training.lens.windows import WindowMaker, WindowSet
from mcjax.types import McjaxError

TEXT_KINDS = ("facts", "cloze", "code", "reworded", "listed", "text")


@dataclasses.dataclass(frozen=True)
class LensWindows:
  """What windows are made of.

  Attributes:
    questions: files of natural questions with the text that answers them, a
      kind of window each, named by the file.
    passes: how often every question is put, among other documents each time.
    facts, cloze, code, reworded, listed, text: histories of each kind, see
      `histories`; for those of text the base runs.
    validation: histories of each kind, and of the questions, at most.
    length: tokens of a history.
    window: slots of the window that reads text on.
    most: histories of each file of questions at most; 0 takes all.
  """

  questions: tuple[str, ...] = ()
  passes: int = 2
  facts: int = 48
  cloze: int = 40
  code: int = 24
  reworded: int = 40
  listed: int = 40
  text: int = 0
  validation: int = 8
  length: int = LENGTH
  window: int = 1024
  most: int = 0

  def __post_init__(self):
    for name in ("passes", "validation"):
      if getattr(self, name) < 1:
        raise McjaxError(f"config.windows.{name} must be >= 1, got "
                         f"{getattr(self, name)}")
    if self.length < 2048:
      raise McjaxError("config.windows.length must be >= 2048, got "
                       f"{self.length}")


@dataclasses.dataclass(frozen=True)
class LensRunConfig:
  """See the parts; `mixture` holds (kind, share of the steps)."""

  windows: LensWindows
  objective: LensObjective
  train: LensTrainConfig
  mixture: tuple[tuple[str, float], ...]
  lens: tuple[tuple[str, Any], ...] = ()


def read_config(values: Mapping[str, Any]) -> LensRunConfig:
  """The run's settings from plain values.

  Raises:
    McjaxError: names an unknown field or an invalid value.
  """
  read_fields(lensnet.LensNetConfig, "lens", {"d_model": 1, **values["lens"]})
  windows = dict(values["windows"])
  windows["questions"] = tuple(windows["questions"])
  return LensRunConfig(
    read_fields(LensWindows, "windows", windows),
    read_fields(LensObjective, "objective", values["objective"]),
    read_fields(LensTrainConfig, "train", values["train"]),
    tuple(sorted(values["mixture"].items())),
    tuple(sorted(values["lens"].items())))


class NoGists:
  """In place of a GistNet, for a LensNet that reads no gists: zeros."""

  fingerprint = "none"
  slots_per_gist = 1

  def __init__(self, d_model: int):
    self.d_model = d_model

  def encode_tokens(self, token_ids: np.ndarray) -> np.ndarray:
    """Zeros [n, D] for ids [n, 32]."""
    return np.zeros((len(token_ids), self.d_model), np.float32)

  def encode_gists(self, gists: np.ndarray, level: int) -> np.ndarray:
    """Zeros [n, D] for gists [n, 32, D]."""
    del level
    return np.zeros((len(gists), self.d_model), np.float32)

  def gists_seen(self, window: int) -> int:
    """None."""
    del window
    return 0

  def reader(self, lm: BaseLM) -> BaseLM:
    """The base as it is."""
    return lm


class LensRun:
  """Makes windows, trains, exports; every part is resumed from the workdir.

  Args:
    lm: the frozen base.
    encoder: its GistNet.
    config: the run.
    stores: {split: {kind: TokenStore}} of train and validation.
    workdir: of windows, checkpoints and metrics.
    initial: parameters to start from, for instance with a table of keys.
    initial_card: the facts of these, which the new card keeps.
    mesh: of the training; all devices of all processes if None.

  Attributes:
    params: the last parameters; `initial`, or fresh ones, before.
    lens: sizes of LensNet.
    validation: {kind: WindowSet} once it has run.
  """

  def __init__(self, lm, encoder, config: LensRunConfig,
               stores: Mapping[str, Mapping[str, TokenStore]], workdir,
               initial: Mapping[str, Any] | None = None,
               initial_card: Mapping[str, Any] | None = None, mesh=None):
    self._lm, self._config, self._initial_card = lm, config, initial_card
    if not dict(config.lens).get("gists", True):
      encoder = cast(GistEncoder, NoGists(lm.config.d_model))
    self._encoder = encoder
    self._stores, self._mesh = stores, mesh
    self.workdir = place(workdir)
    fields = {"d_model": lm.config.d_model, **dict(config.lens)}
    if initial and "table" in initial:
      fields["key_dim"] = int(initial["table"]["vectors"].shape[1])
    self.lens = lensnet.LensNetConfig(**fields)
    fresh = lensnet.init_params(self.lens, config.train.seed)
    self.params: dict[str, Any] = {**fresh, **_fitting(initial, fresh)}
    self.validation: dict[str, WindowSet] = {}
    self._trainer: LensTrainer | None = None

  def run(self) -> bool:
    """Windows and training; False if stopped by a signal."""
    keyer = LensKeyer(self.params, self.lens, self._lm)
    found: dict[str, dict[str, WindowSet]] = {}
    effects = None
    if self._config.windows.text:
      effects = Effects(self._lm, self._encoder, self.policy(),
                        self._config.windows.window)
    for split in ("train", "validation"):
      maker = WindowMaker(self._lm, self._encoder, keyer,
                          self._config.train.seed, effects)
      files = self._make(split, maker)
      if files is None:
        return False
      found[split] = {
        kind: WindowSet.load(paths) for kind, paths in files.items() if paths}
    self._trainer = LensTrainer(
      self._lm, self.lens, self._config.train, self._config.objective,
      found["train"], dict(self._config.mixture), self.params,
      self.workdir / "training", self._encoder.fingerprint, self._mesh)
    self.validation = found["validation"]
    return self._trainer.run(self.validation)

  def evaluate(self) -> dict[str, float]:
    """`trainer.evaluate` of the current parameters on validation windows."""
    embed = np.asarray(self._lm.params["embed"], np.float32)
    return evaluate(self.params, self.lens, embed, self.validation)

  def _make(self, split: str, maker: WindowMaker
            ) -> dict[str, list[epath.Path]] | None:
    """Files of windows by kind; None if stopped. Processes share the work."""
    return make_files(
      self.workdir / "windows" / split, made_histories(
        self._config.windows, split, self._lm.tokenizer, self._stores[split],
        self._config.train.seed), maker.write, f"{split} windows")

  def policy(self) -> LensNetPolicy:
    """The policy with the current weights."""
    return LensNetPolicy(
      self.lens, self.params, self._lm, self._encoder,
      card={"gistnet": self._encoder.fingerprint})

  def export(self, path, card: Mapping[str, Any]) -> None:
    """Writes the weights with the facts of `card`.

    Raises:
      McjaxError: nothing was trained.
    """
    if self._trainer is None:
      raise McjaxError("nothing was trained: nothing to export")
    before = {"started_from": self._initial_card} if self._initial_card else {}
    self.params = self._trainer.export(path, {**card, **before})


def make_files(folder: epath.Path, made: Iterable[tuple],
               write: Callable[[epath.Path, History, int], None], what: str
               ) -> dict[str, list[epath.Path]] | None:
  """A file for every history, by kind, unless it is there; processes share.

  Args:
    folder: of the files.
    made: `made_histories`.
    write: writes the file of a history and its number, or none for a poor one.
    what: is made, in words.

  Returns:
    the files; None if stopped by a signal.
  """
  folder.mkdir(parents=True, exist_ok=True)
  files: dict[str, list[epath.Path]] = {}
  with processes.StopSignal() as stop:
    for number, (kind, index, history) in enumerate(tqdm.tqdm(
        made, desc=what, unit="history", disable=not processes.is_first())):
      path = folder / f"{kind}-{index:05}.npz"
      if processes.is_mine(number) and not path.exists():
        write(path, history(), number)
      files.setdefault(kind, []).append(path)
      if stop.reached():
        return None
  processes.barrier(f"{what} are made")
  return {kind: [p for p in paths if p.exists()]
          for kind, paths in files.items()}


def made_histories(
  config: LensWindows, split: str, tokenizer: Tokenizer,
  stores: Mapping[str, TokenStore], seed: int
) -> Iterator[tuple[str, int, Callable[[], History]]]:
  """(kind, number, a function that makes the history) of a split."""
  c = config
  most = c.validation if split == "validation" else None
  asked = most or c.most or None
  strangers: list[str] = []
  for path in c.questions:
    documents = questions.read_questions(path, split, tokenizer)
    strangers += [question for _, some in documents for question, *_ in some]
    every = itertools.chain.from_iterable(
      questions.question_histories(documents, tokenizer, number)
      for number in range(1 if most else c.passes))
    kind = pathlib.Path(path).name.split("-")[0].split(".")[0]
    for i, history in enumerate(itertools.islice(every, asked)):
      yield kind, i, _given(history)
  source = TextHistories(stores, tokenizer, seed, c.length, split, strangers)
  for kind in TEXT_KINDS:
    for i in range(min(getattr(c, kind), most or getattr(c, kind))):
      yield kind, i, _drawn(source, kind, i)


def _given(history: History):
  return lambda: history


def _drawn(source: TextHistories, kind: str, number: int):
  return lambda: getattr(source, kind)(number)


def _fitting(initial: Mapping[str, Any] | None, fresh: Mapping[str, Any]
             ) -> dict[str, Any]:
  """The parts of earlier parameters that this LensNet can go on with."""
  kept = dict(initial or {})
  if kept.get("keys") is not None and "table" not in kept and (
      np.shape(jax.tree.leaves(kept["keys"])[0])
      != np.shape(jax.tree.leaves(fresh["keys"])[0])):
    del kept["keys"]
  return kept
