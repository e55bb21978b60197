"""A GistNet run's settings, its learning rate and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from mcjax.settings import read_fields
from mcjax.training.gist.losses import Objective
from mcjax.types import McjaxError


@dataclasses.dataclass(frozen=True)
class Phase:
  """`steps` optimizer steps that take the objectives in turn."""

  steps: int
  turns: tuple[Objective, ...]

  def __init__(self, steps: int, *turns: Objective):
    object.__setattr__(self, "steps", steps)
    object.__setattr__(self, "turns", turns)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A GistNet run; validated, hashable.

  Attributes:
    phases: the curriculum, run one after another.
    batch: windows per optimizer step, over all processes.
    micro_batch: windows that are in memory at one time.
    optimizer: "adamw" or "muon".
    learning_rate: peak of the schedule; 0 leaves the network as it is.
    adapter_rate: the adapter's peak, by Adam.
    warmup: steps of linear warm-up.
    decay_fraction: part of the run, at its end, over which the rate falls by
      a cosine to `final_rate` of its peak; 1 is plain cosine decay.
    final_rate: what is left of the rate at the end.
    weight_decay, clip, b2: of the optimizer and the global norm.
    seed: of data order and initialisation.
    log_every, evaluate_every, save_every: steps between records.
    validation_documents: documents a kind in the periodic evaluation; 0
      leaves it out.
    mesh_data, mesh_fsdp, mesh_tensor: mesh sizes; data -1 takes what is left.
    keep: checkpoints kept, the newest.
    keep_every: steps between checkpoints that stay for good; 0 for none.
    peak_tflops: bfloat16 TFLOP/s of a device, for `mfu` in the metrics; 0 goes
      by the kind of device, where that is known.
    wandb: a project of Weights & Biases that gets the metrics too; "" for none.
    accept_changes: go on although data, mixture or schedule are others than
      those of the checkpoint; else that is refused.
  """

  phases: tuple[Phase, ...]
  batch: int = 8
  micro_batch: int = 1
  optimizer: str = "adamw"
  learning_rate: float = 1e-3
  adapter_rate: float = 2e-3
  warmup: int = 20
  decay_fraction: float = 1.0
  final_rate: float = 0.05
  weight_decay: float = 0.01
  clip: float = 1.0
  b2: float = 0.98
  seed: int = 0
  log_every: int = 5
  evaluate_every: int = 100
  save_every: int = 50
  validation_documents: int = 10
  mesh_data: int = -1
  mesh_fsdp: int = 1
  mesh_tensor: int = 1
  keep: int = 3
  keep_every: int = 0
  peak_tflops: float = 0.0
  wandb: str = ""
  accept_changes: bool = False

  def __post_init__(self):
    if not self.phases or any(
        p.steps < 1 or not p.turns for p in self.phases):
      raise McjaxError("TrainConfig.phases needs phases of at least one step "
                       "and one objective")
    for name in ("batch", "micro_batch", "log_every", "evaluate_every",
                 "save_every", "keep"):
      if getattr(self, name) < 1:
        raise McjaxError(f"TrainConfig.{name} must be ≥ 1, got "
                         f"{getattr(self, name)}")
    if self.optimizer not in ("adamw", "muon"):
      raise McjaxError("TrainConfig.optimizer must be 'adamw' or 'muon', got "
                       f"{self.optimizer!r}")
    if self.batch % self.micro_batch:
      raise McjaxError(f"TrainConfig.micro_batch={self.micro_batch} does not "
                       f"divide batch={self.batch}")
    if not 0 < self.decay_fraction <= 1:
      raise McjaxError("TrainConfig.decay_fraction must be in (0, 1], got "
                       f"{self.decay_fraction}")

  @property
  def steps(self) -> int:
    """Steps of the whole run."""
    return sum(p.steps for p in self.phases)

  def objective(self, step: int) -> Objective:
    """The objective of optimizer step `step`, counted from 0."""
    for phase in self.phases:
      if step < phase.steps:
        return phase.turns[step % len(phase.turns)]
      step -= phase.steps
    raise McjaxError("step beyond the last phase")

  def schedule(self) -> dict[str, Any]:
    """What the course of training depends on, as plain values."""
    idle = ("batch", "micro_batch", "seed", "log_every", "evaluate_every",
            "save_every", "validation_documents", "mesh_data", "mesh_fsdp",
            "mesh_tensor", "keep", "keep_every", "peak_tflops", "wandb",
            "accept_changes")
    plain = dataclasses.asdict(self)
    for phase in plain["phases"]:
      for turn in phase["turns"]:
        del turn["attention"]  # computes the same
    return {k: v for k, v in plain.items() if k not in idle}

  def tokens(self, steps: int) -> int:
    """Tokens read in the first `steps` steps."""
    return sum(self.batch * self.objective(s).window for s in range(steps))


def read_config(train: Mapping[str, Any], objective: Mapping[str, Any],
                phases: Sequence[Mapping[str, Any]]) -> TrainConfig:
  """A `TrainConfig` from plain values.

  Args:
    train: fields of `TrainConfig` other than `phases`.
    objective: fields of `Objective` that all phases share.
    phases: {"steps", "turns": [what differs from `objective`, …]} of each.

  Raises:
    McjaxError: names an unknown field or an invalid value.
  """
  read = [
    Phase(p["steps"], *(
      read_fields(Objective, "objective", {**objective, **turn})
      for turn in p["turns"]))
    for p in phases]
  return read_fields(TrainConfig, "train", {**train, "phases": tuple(read)})


def schedule(config: TrainConfig, peak: float | None = None
             ) -> optax.Schedule:
  """Linear warm-up, a plateau, a cosine down to `final_rate` of the peak."""
  decay = max(1, round(config.steps * config.decay_fraction) - (
    config.warmup if config.decay_fraction == 1 else 0))
  peak = config.learning_rate if peak is None else peak
  return optax.join_schedules(
    [optax.linear_schedule(peak / max(1, config.warmup), peak, config.warmup),
     optax.constant_schedule(peak),
     optax.cosine_decay_schedule(peak, decay, config.final_rate)],
    [config.warmup, max(config.warmup, config.steps - decay)])


def _matrices(params):
  """Marks the leaves that Muon takes; None leaves a leaf to Adam.

  Embeddings, scales and picks are no maps between feature spaces. Weights per
  level have one more axis and are all left to Adam.
  """
  def mark(path, leaf):
    if path[-1].key.startswith("w") and np.ndim(leaf) == 2:
      return contrib.MuonDimensionNumbers()
    return None

  return jax.tree_util.tree_map_with_path(mark, params)


def _parts(params):
  """Marks every leaf as the network's or the adapter's."""
  return {
    name: jax.tree.map(
      lambda _, name=name: "adapter" if name == "adapter" else "network", stage)
    for name, stage in params.items()}


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW or Muon with global norm clipping; matrices only are decayed.

  Muon (kellerjordan.github.io/posts/muon) orthogonalises the momentum of
  every matrix; its steps are scaled to the size of Adam's, so that one rate
  serves both (arXiv:2502.16982). The adapter has a rate of its own.
  """
  if config.optimizer == "muon":
    rule = contrib.muon(
      schedule(config), adam_b1=0.9, adam_b2=config.b2,
      weight_decay=config.weight_decay, consistent_rms=0.2,
      muon_weight_dimension_numbers=_matrices)
  else:
    rule = optax.adamw(
      schedule(config), b1=0.9, b2=config.b2,
      weight_decay=config.weight_decay,
      mask=lambda p: jax.tree.map(lambda a: np.ndim(a) > 1, p))
  adapter = optax.adam(
    schedule(config, config.adapter_rate), b1=0.9, b2=config.b2)
  rules = optax.multi_transform(
    {"network": rule, "adapter": adapter}, _parts)
  return optax.chain(optax.clip_by_global_norm(config.clip), rules)


def init_state(config: TrainConfig, params) -> dict[str, Any]:
  """A fresh state: parameters, optimizer state and the step counter."""
  params = jax.tree.map(lambda a: jnp.array(a, copy=True), params)
  return {"params": params, "optimizer": optimizer(config).init(params),
          "step": jnp.zeros((), jnp.int32)}
