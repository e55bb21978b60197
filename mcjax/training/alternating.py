"""Alternates GistNet and LensNet phases, as the mission says.

In a cycle GistNet trains on as before, from the last cycle's weights; then
LensNet learns on windows that hold the new gists, from its own last weights.
Every phase has a folder of its own in the workdir and is resumed from there.
What it brought is measured at the end, for every cycle on the same text and
the same labelled windows.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from mcjax import pretrained
from mcjax.gist import encoder as gistnet
from mcjax.parallel import processes
from mcjax.training.common.data import TokenStore
from mcjax.training.gist.trainer import GistTrainer, TrainConfig
from mcjax.training.lens import losses as lens_losses
from mcjax.training.lens import rounds as lens_rounds
from mcjax.training.lens import trainer as lens_trainer
from mcjax.training.lens.labels import Labelled
from mcjax.training.lens.rounds import LensRounds, LensRoundsConfig
from mcjax.types import McjaxError


@dataclasses.dataclass(frozen=True)
class Cycle:
  """What a cycle left behind: paths of the two weights files."""

  gistnet: pathlib.Path
  lensnet: pathlib.Path


class Alternation:
  """Runs `cycles` cycles.

  Args:
    lm: the frozen base.
    gist_config: sizes of GistNet.
    gist_train: a cycle's GistNet phase.
    lens: a cycle's LensNet rounds.
    cycles: how many.
    train, validation: {kind: TokenStore}.
    workdir: of everything.
    initial: GistNet parameters to start from; fresh ones if None.
    mixture: weights of the kinds of text.
  """

  def __init__(self, lm, gist_config: gistnet.GistNetConfig,
               gist_train: TrainConfig, lens: LensRoundsConfig, cycles: int,
               train: Mapping[str, TokenStore],
               validation: Mapping[str, TokenStore], workdir, initial=None,
               mixture: Mapping[str, float] | None = None):
    if cycles < 1:
      raise McjaxError(f"config.cycles must be ≥ 1, got {cycles}")
    self._lm, self._gist_config = lm, gist_config
    self._gist_train, self._lens, self._cycles = gist_train, lens, cycles
    self._train, self._validation = train, validation
    self._mixture, self._initial = mixture, initial
    self.workdir = pathlib.Path(workdir)
    self._held: list[Labelled] = []

  def run(self) -> bool:
    """All cycles and the report; False if stopped by a signal."""
    gist_params, lens_params, cycles = self._initial, None, []
    for number in range(self._cycles):
      folder = self.workdir / f"cycle-{number}"
      done = Cycle(folder / "gistnet.safetensors",
                   folder / "lensnet.safetensors")
      trainer = GistTrainer(
        self._lm, self._gist_config, self._gist_train, self._train,
        folder / "gistnet", self._mixture, gist_params)
      if not trainer.run(self._validation):
        return False
      trainer.export(done.gistnet, {"cycle": number})
      gist_params, encoder = trainer.params(), trainer.encoder()
      rounds = LensRounds(self._lm, encoder, self._lens, self._train,
                          folder / "lensnet", lens_params)
      if not rounds.run():
        return False
      rounds.export(done.lensnet, {"cycle": number})
      lens_params = rounds.params
      self._held += rounds.held
      cycles.append(done)
    if processes.is_first():
      self._report(cycles)
    processes.barrier("reported")
    return True

  def _report(self, cycles: list[Cycle]) -> None:
    """Writes results.json and results.md: a row per cycle."""
    embed = np.asarray(self._lm.params["embed"], np.float32)
    rows: list[dict[str, Any]] = []
    for number, cycle in enumerate(cycles):
      encoder = gistnet.load_gistnet(self._lm, cycle.gistnet)
      params, config = lens_rounds.load_params(cycle.lensnet)
      card = pretrained.read_weights(cycle.gistnet, "gistnet")[2]
      row = {"cycle": number, "gist_steps": card["steps"],
             "recovered": self._recovered(number)}
      if self._held:
        windows = lens_losses.stack(self._held, embed, encoder)
        row |= lens_trainer.evaluate(params, config, embed, windows)
      rows.append(row)
    text = json.dumps({"windows": len(self._held), "cycles": rows}, indent=1)
    (self.workdir / "results.json").write_text(text)
    names = list(rows[0])
    lines = ["# alternate", "", "| " + " | ".join(names) + " |",
             "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(_cell(row[n]) for n in names) + " |"
              for row in rows]
    (self.workdir / "results.md").write_text("\n".join(lines) + "\n")

  def _recovered(self, number: int) -> float | None:
    """Best share recovered on the validation text in a GistNet phase."""
    path = self.workdir / f"cycle-{number}" / "gistnet" / "best.json"
    return json.loads(path.read_text())["recovered"] if path.exists() else None


def _cell(value) -> str:
  return f"{value:.3f}" if isinstance(value, float) else str(value)
