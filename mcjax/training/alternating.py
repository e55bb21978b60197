"""Alternates GistNet and LensNet phases, as the mission says.

In a cycle GistNet trains on as before, from the last cycle's weights; then
LensNet learns on windows that hold the new gists, from its own last weights.
Every phase has a folder of its own in the workdir and is resumed from there.
What it brought is measured at the end: for every cycle what GistNet recovers on
the validation text, and what LensNet finds in windows that hold its gists.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
from typing import Any

from mcjax.gist import encoder as gistnet
from mcjax.parallel import processes
from mcjax.parallel.places import place
from mcjax.training.common.data import TokenStore
from mcjax.training.gist.trainer import GistTrainer, TrainConfig
from mcjax.training.lens.run import LensRun, LensRunConfig
from mcjax.types import McjaxError


class Alternation:
  """Runs `cycles` cycles.

  Args:
    lm: the frozen base.
    gist_config: sizes of GistNet.
    gist_train: a cycle's GistNet phase.
    lens: a cycle's LensNet run.
    cycles: how many.
    train, validation: {kind: TokenStore}.
    workdir: of everything.
    initial: GistNet parameters to start from; fresh ones if None.
    mixture: weights of the kinds of text.
    lens_initial: LensNet parameters to start from.
  """

  def __init__(self, lm, gist_config: gistnet.GistNetConfig,
               gist_train: TrainConfig, lens: LensRunConfig, cycles: int,
               train: Mapping[str, TokenStore],
               validation: Mapping[str, TokenStore], workdir, initial=None,
               mixture: Mapping[str, float] | None = None,
               lens_initial: Mapping[str, Any] | None = None):
    if cycles < 1:
      raise McjaxError(f"config.cycles must be ≥ 1, got {cycles}")
    self._lm, self._gist_config = lm, gist_config
    self._gist_train, self._lens, self._cycles = gist_train, lens, cycles
    self._train, self._validation = train, validation
    self._mixture, self._initial = mixture, initial
    self.workdir = place(workdir)
    self._lens_start = lens_initial

  def run(self) -> bool:
    """All cycles and the report; False if stopped by a signal."""
    gist_params, lens_params = self._initial, self._lens_start
    rows: list[dict[str, Any]] = []
    for number in range(self._cycles):
      folder = self.workdir / f"cycle-{number}"
      trainer = GistTrainer(
        self._lm, self._gist_config, self._gist_train, self._train,
        folder / "gistnet", self._mixture, gist_params)
      if not trainer.run(self._validation):
        return False
      trainer.export(folder / "gistnet.safetensors", {"cycle": number})
      gist_params, encoder = trainer.params(), trainer.encoder()
      lens = LensRun(
        self._lm, encoder, self._lens,
        {"train": self._train, "validation": self._validation},
        folder / "lensnet", lens_params)
      if not lens.run():
        return False
      lens.export(folder / "lensnet.safetensors", {"cycle": number})
      lens_params = lens.params
      rows.append({
        "cycle": number, "gist_steps": trainer.step,
        "recovered": self._recovered(number), **lens.evaluate()})
    if processes.is_first():
      self._report(rows)
    processes.barrier("reported")
    return True

  def _report(self, rows: list[dict[str, Any]]) -> None:
    """Writes results.json and results.md: a row per cycle."""
    text = json.dumps({"cycles": rows}, indent=1)
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
