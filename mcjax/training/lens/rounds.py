"""On-policy rounds: label what the current policy reaches, then train."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import tqdm

from mcjax import pretrained
from mcjax.lens import network as lensnet
from mcjax.lens.policy import LensNetPolicy
from mcjax.parallel import processes
from mcjax.settings import read_fields
from mcjax.training.common.data import TokenStore
from mcjax.training.lens import labels as focus_labels
from mcjax.training.lens import losses as lens_losses
from mcjax.training.lens import tasks as focus_tasks
from mcjax.training.lens.labels import LabelConfig, Labelled, Labeller
from mcjax.training.lens.losses import LensObjective
from mcjax.training.lens.trainer import LensTrainConfig, LensTrainer
from mcjax.types import McjaxError

_OTHERS = 192  # blocks of other text beside the questions' own
_HOST = 200_000  # tokens of each kind from which such blocks are taken


@dataclasses.dataclass(frozen=True)
class Round:
  """Tasks labelled anew, then optimizer steps on all labels so far."""

  tasks: int
  steps: int


@dataclasses.dataclass(frozen=True)
class LensRoundsConfig:
  """A whole LensNet run.

  Attributes:
    rounds: the first follows the tasks with the hand-written policies, every
      other one with the LensNet of the round before.
    labels, objective, train: see there; `train.steps` is the round's.
    lens: fields of `LensNetConfig` that differ from the defaults.
    longest: tokens of a history at most.
    validation_every: every so many tasks one is kept for validation.
    pairs: made-up questions for the keys.
  """

  rounds: tuple[Round, ...]
  labels: LabelConfig
  objective: LensObjective
  train: LensTrainConfig
  lens: tuple[tuple[str, Any], ...] = ()
  longest: int = 16384
  validation_every: int = 7
  pairs: int = 4096


def read_config(values: Mapping[str, Any]) -> LensRoundsConfig:
  """The run's settings from plain values.

  Raises:
    McjaxError: names an unknown field or an invalid value.
  """
  rounds = tuple(read_fields(Round, "rounds", r) for r in values["rounds"])
  if not rounds or any(r.tasks < 1 or r.steps < 1 for r in rounds):
    raise McjaxError("config.rounds needs rounds of at least one task and step")
  read_fields(lensnet.LensNetConfig, "lens", {"d_model": 1, **values["lens"]})
  return LensRoundsConfig(
    rounds, read_fields(LabelConfig, "labels", values["labels"]),
    read_fields(LensObjective, "objective", values["objective"]),
    read_fields(LensTrainConfig, "train", values["train"]),
    tuple(sorted(values["lens"].items())), values["longest"],
    values["validation_every"], values["pairs"])


class LensRounds:
  """Runs the rounds; every part is resumed from the workdir.

  Args:
    lm: the frozen base.
    encoder: its GistNet.
    config: the run.
    stores: {kind: TokenStore} of the training split.
    workdir: of labels, checkpoints and metrics.
    initial: LensNet parameters to start from.
    mesh: of the training; all devices of all processes if None.

  Attributes:
    params: the best parameters of the last round; `initial` before.
    held: labelled windows kept for validation.
  """

  def __init__(self, lm, encoder, config: LensRoundsConfig,
               stores: Mapping[str, TokenStore], workdir, initial=None,
               mesh=None):
    self._lm, self._encoder, self._config = lm, encoder, config
    self._mesh = mesh
    self.workdir = pathlib.Path(workdir)
    self._tasks = focus_tasks.TaskSource(
      stores, lm.tokenizer, config.longest, config.train.seed)
    self._host = np.concatenate(
      [np.asarray(s.tokens[:_HOST], np.int32) for s in stores.values()])
    self.lens = lensnet.LensNetConfig(
      **{"d_model": lm.config.d_model, **dict(config.lens)})
    self.params = initial
    self.held: list[Labelled] = []
    self._trainer: LensTrainer | None = None

  def run(self) -> bool:
    """All rounds; False if stopped by a signal."""
    windows: list[Labelled] = []
    self.held, first = [], 0
    for number, one in enumerate(self._config.rounds):
      if not self._label(number, one, first, windows):
        return False
      first += one.tasks
      self._trainer = self._make_trainer(number, one, windows)
      if not self._trainer.run(self.held):
        return False
      self.params = self._trainer.best_params()
    return True

  def policy(self) -> LensNetPolicy | None:
    """The policy with the current weights; None before there are any."""
    if self.params is None:
      return None
    return LensNetPolicy(
      self.lens, self.params, self._lm, self._encoder,
      card={"gistnet": self._encoder.fingerprint})

  def _label(self, number: int, one: Round, first: int, windows) -> bool:
    """Labels the round's tasks into `windows` and `held`."""
    policy = self.policy() if number else None
    labeller = Labeller(
      self._lm, self._encoder, self._config.labels, policy,
      policy.keyer if policy else None)
    made = focus_labels.make(
      self.workdir / f"labels-{number}", labeller, self._tasks, one.tasks,
      first, dataclasses.asdict(self._config.labels))
    with processes.StopSignal() as stop:
      for _ in tqdm.tqdm(made, unit="task", dynamic_ncols=True,
                         disable=not processes.is_first()):
        if stop.reached():
          return False
    for task, labelled in focus_labels.read_tasks(
        self.workdir / f"labels-{number}", one.tasks, first):
      kept = task % self._config.validation_every == 1
      (self.held if kept else windows).extend(labelled)
    return True

  def _make_trainer(self, number: int, one: Round, windows) -> LensTrainer:
    c = self._config
    pairs = lens_losses.draw_pairs(
      c.pairs, _OTHERS, self._lm.tokenizer, self._host, focus_tasks.draw_fact,
      c.train.seed)
    return LensTrainer(
      self._lm, self._encoder, self.lens,
      dataclasses.replace(c.train, steps=one.steps), c.objective, windows,
      pairs, self.workdir / f"round-{number}", self.params, self._mesh)

  def export(self, path, card: Mapping[str, Any]) -> None:
    """Writes the last round's weights with the facts of `card`.

    Raises:
      McjaxError: nothing was trained.
    """
    if self._trainer is None:
      raise McjaxError("no round was trained: nothing to export")
    self._trainer.export(path, json.loads(json.dumps(dict(card))))


def load_params(path):
  """(params, config) of a weights file; see `pretrained.read_weights`."""
  params, fields, _ = pretrained.read_weights(path, "lensnet")
  return params, lensnet.LensNetConfig(**fields)
