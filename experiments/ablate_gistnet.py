"""GistNet's ablations: python -m experiments.ablate_gistnet --workdir=…

Every ablation is a run of `train_gistnet` in its own folder of the workdir, on
the same windows in the same order; finished ones are not run again. SIGTERM or
Ctrl-C leaves a checkpoint. The table of all finished ones goes to results.md.
Processes with other --names may share a workdir, and an accelerator.
"""

import json
import pathlib

from absl import flags, logging
import jax
import numpy as np

from experiments.configs import gistnet_ablation
from mcjax.base.compilation_cache import use_compilation_cache
from mcjax.base.load import load_base_lm
from mcjax.cli import commands
from mcjax.gist import encoder as gistnet
from mcjax.training.common import data
from mcjax.training.gist import recovery
from mcjax.training.gist import trainer as gist_trainer

_WORKDIR = flags.DEFINE_string("workdir", None, "A folder per ablation.")
_NAMES = flags.DEFINE_list("names", [], "Only these; all if empty.")
_STEPS = flags.DEFINE_integer("steps", 80, "Optimizer steps of each.", 2)
_BATCH = flags.DEFINE_integer("batch", 2, "Windows of 512 tokens a step.", 1)
_MICRO = flags.DEFINE_integer("micro_batch", 2, "Of them in memory at once.", 1)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"],
  "Of the frozen base; float32 where the CPU has no bfloat16 products.")
flags.mark_flag_as_required("workdir")


def _train(lm, name: str, workdir: pathlib.Path) -> bool:
  """Trains an ablation and keeps what it reached; False if it was stopped."""
  c = gistnet_ablation.get_config(name, _STEPS.value, _BATCH.value)
  c.train.micro_batch = _MICRO.value
  config = gist_trainer.read_config(c.train, c.objective, c.phases)
  network = gistnet.configure(lm.params, lm.config, c.gistnet)
  folder = pathlib.Path(c.data or data.default_folder())
  mixture = dict(c.mixture)
  trainer = gist_trainer.GistTrainer(
    lm, network, config, data.open_split(folder, "train", mixture),
    workdir / name, mixture, controls=workdir / "controls")
  if not trainer.run():
    return False
  losses, _ = trainer.measure(data.open_split(folder, "validation"))
  np.savez(workdir / name / "losses.npz", **losses)
  facts = {
    "params": sum(a.size for a in jax.tree.leaves(trainer.state["params"])),
    "flops": gistnet.flops_per_token(network, lm.config)
             / lm.config.flops_per_token,
    "kl": _late_kl(workdir / name, config.steps)}
  (workdir / name / "facts.json").write_text(json.dumps(facts))
  return True


def _late_kl(workdir: pathlib.Path, steps: int) -> float | None:
  """Mean training KL of the second half of a run; None if not computed."""
  rows = [json.loads(line) for line in
          (workdir / "metrics.jsonl").read_text().splitlines()]
  found = [row["kl"] for row in rows
           if row["step"] > steps // 2 and row.get("kl")]
  return float(np.mean(found)) if found else None


def _row(workdir: pathlib.Path, name: str) -> str:
  """A line of the table."""
  facts = json.loads((workdir / name / "facts.json").read_text())
  mine, base = (
    dict(np.load(path)) if path.exists() else None
    for path in (workdir / n / "losses.npz" for n in (name, "baseline")))
  reached = recovery.recovered(mine)

  def more(rows):
    return recovery.recovered(mine, rows=rows) - recovery.recovered(
      base, rows=rows)

  # A sink makes other excerpts, which cannot be paired with the baseline's.
  difference = "–"
  if base is not None and np.array_equal(mine["full"], base["full"]):
    low, high = recovery.interval(more, len(base["full"]))
    difference = f"{more(slice(None)):+.3f} [{low:+.3f}, {high:+.3f}]"
  kl = "–" if facts["kl"] is None else f"{facts['kl']:.3f}"
  return (f"| {name} | {reached:.3f} | {difference} | {kl} | "
          f"{facts['params'] / 1e6:.2f}M | {facts['flops']:.2%} |")


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  workdir = pathlib.Path(_WORKDIR.value)
  names = _NAMES.value or list(gistnet_ablation.ABLATIONS)
  for name in names:
    gistnet_ablation.get_config(name)  # an unknown name ends it here
  use_compilation_cache(workdir / "compiled")
  lm = load_base_lm(gistnet_ablation.get_config().base, dtype=_DTYPE.value)
  for name in names:
    if not (workdir / name / "facts.json").exists() and not _train(
        lm, name, workdir):
      return
    print(_row(workdir, name), flush=True)
    lines = [
      "| ablation | recovered | less baseline | KL | parameters | FLOPs |",
      "|---|---|---|---|---|---|"]
    lines += [_row(workdir, n) for n in gistnet_ablation.ABLATIONS
              if (workdir / n / "facts.json").exists()]
    (workdir / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
  commands.run(main)
