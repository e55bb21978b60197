"""Ablations of GistNet: one short run each, compared with the baseline's.

Every ablation has a folder of its own in the workdir and reads the same
windows in the same order; finished ones are not run again. Processes with
other names may share a workdir, and an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterable
import json
import pathlib
from typing import Any

import jax
import numpy as np

from mcjax.gist import encoder as gistnet
from mcjax.gist import weights as gist_weights
from mcjax.training.common import data
from mcjax.training.gist import key_value_loss, recovery
from mcjax.training.gist import trainer as gist_trainer

_HEAD = ("| ablation | recovered | less baseline | KL | parameters | FLOPs |",
         "|---|---|---|---|---|---|")


def run(lm, name: str, config, workdir: pathlib.Path) -> bool:
  """Trains an ablation and keeps what it reached; False if it was stopped.

  Args:
    lm: the frozen base.
    name: of the ablation and its folder.
    config: gistnet, objective, phases, train, mixture and data, as in a
      configuration of `experiments.train_gistnet`.
    workdir: of all ablations.
  """
  folder = workdir / name
  if (folder / "facts.json").exists():
    return True
  trainer = start(lm, name, config, workdir)
  if not trainer.run():
    return False
  record(trainer, lm.config, data.open_split(config.data, "validation"))
  return True


def start(lm, name: str, config, workdir: pathlib.Path
          ) -> gist_trainer.GistTrainer:
  """The trainer of an ablation, before its first step; as `run`."""
  train = gist_trainer.read_config(
    config.train, config.objective, config.phases)
  initial, network, _ = gist_weights.start(
    lm, config.gistnet, config.initial, train.seed)
  stores, mixture = data.open_mixture(
    config.data, config.mixture, config.kinds, lm)
  if network.key_value:
    initial = key_value_loss.started(lm, network, initial, stores, train.seed)
  return gist_trainer.GistTrainer(
    lm, network, train, stores, workdir / name, mixture, initial,
    controls=workdir / "controls")


def record(trainer: gist_trainer.GistTrainer, base_config, validation) -> None:
  """Keeps what a finished ablation reached on the validation stores."""
  folder, network = pathlib.Path(trainer.workdir), trainer.gist_config
  losses, _ = trainer.measure(validation)
  if network.key_value:
    losses["gist"] = losses.pop("key_value")
  arrays: dict[str, Any] = dict(losses)
  np.savez(folder / "losses.npz", **arrays)
  facts = {
    "params": sum(a.size for a in jax.tree.leaves(trainer.state["params"])),
    "flops": gistnet.flops_per_token(network, base_config)
             / base_config.flops_per_token,
    "kl": _late_kl(folder, trainer.config.steps)}
  (folder / "facts.json").write_text(json.dumps(facts))


def table(workdir: pathlib.Path, names: Iterable[str]) -> str:
  """Markdown, a line for every finished one of `names`."""
  rows = [_row(workdir, n) for n in names
          if (workdir / n / "facts.json").exists()]
  return "\n".join([*_HEAD, *rows]) + "\n"


def _late_kl(folder: pathlib.Path, steps: int) -> float | None:
  """Mean training KL of the second half of a run; None if not computed."""
  rows = [json.loads(line) for line in
          (folder / "metrics.jsonl").read_text().splitlines()]
  found = [kl for row in rows
           for kl in [row.get("kl", row.get("kl_key_value"))]
           if row["step"] > steps // 2 and kl]
  return float(np.mean(found)) if found else None


def _row(workdir: pathlib.Path, name: str) -> str:
  facts = json.loads((workdir / name / "facts.json").read_text())
  mine = dict(np.load(workdir / name / "losses.npz"))
  baseline = workdir / "baseline" / "losses.npz"
  difference = _difference(mine, baseline) if baseline.exists() else "–"
  reached = recovery.recovered(mine)
  kl = "–" if facts["kl"] is None else f"{facts['kl']:.3f}"
  return (f"| {name} | {reached:.3f} | {difference} | {kl} | "
          f"{facts['params'] / 1e6:.2f}M | {facts['flops']:.2%} |")


def _difference(mine, baseline: pathlib.Path) -> str:
  """What is recovered more than by the baseline, on the same excerpts."""
  base = dict(np.load(baseline))

  def more(rows):
    return recovery.recovered(mine, rows=rows) - recovery.recovered(
      base, rows=rows)

  # A sink makes other excerpts, which cannot be paired with the baseline's.
  if not np.array_equal(mine["full"], base["full"]):
    return "–"
  low, high = recovery.interval(more, len(base["full"]))
  return f"{more(slice(None)):+.3f} [{low:+.3f}, {high:+.3f}]"
