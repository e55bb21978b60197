"""Trains GistNet beside a frozen base: one jitted step under a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import tqdm

from mcjax.gist import encoder as gistnet
from mcjax.parallel import sharding
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.settings import read_fields
from mcjax.training.common import data
from mcjax.training.common.metrics import MetricWriter
from mcjax.training.common.stop_signal import StopSignal
from mcjax.training.gist import foreign_loss, level_loss, losses, recovery
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
    mesh_data, mesh_model: mesh sizes; data -1 takes what is left.
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
  mesh_model: int = 1

  def __post_init__(self):
    if not self.phases or any(
        p.steps < 1 or not p.turns for p in self.phases):
      raise McjaxError("TrainConfig.phases needs phases of at least one step "
                       "and one objective")
    for name in ("batch", "micro_batch", "log_every", "evaluate_every",
                 "save_every"):
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


def train_step(state, base_params, ids, *, config: TrainConfig, gist_config,
               base_config, objective: Objective):
  """One optimizer step on ids [micro-batches, windows, window].

  A pure function of the state and the ids: the randomness of the objective
  comes from the seed and the step counter.

  Returns:
    the next state, and metrics averaged over all windows.
  """
  loss = level_loss if objective.level == 2 else losses
  if objective.foreign:
    loss, ids = foreign_loss, foreign_loss.exchange(ids, objective)
  grad = jax.value_and_grad(
    functools.partial(
      loss.window_loss, gist_config=gist_config, base_params=base_params,
      base_config=base_config, o=objective), has_aux=True)
  root = jax.random.fold_in(jax.random.key(config.seed), state["step"])
  keys = jax.random.split(root, ids.shape[:2])

  def micro(total, piece):
    ids, keys = piece
    (_, metrics), gradient = jax.vmap(
      lambda i, k: grad(state["params"], ids=i, key=k))(ids, keys)
    mean = jax.tree.map(lambda a: jnp.mean(a, axis=0), gradient)
    return jax.tree.map(jnp.add, total, mean), metrics

  zero = jax.tree.map(jnp.zeros_like, state["params"])
  total, metrics = jax.lax.scan(micro, zero, (ids, keys))
  gradient = jax.tree.map(lambda a: a / np.float32(ids.shape[0]), total)
  with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
    updates, moments = optimizer(config).update(
      gradient, state["optimizer"], state["params"])
    rate = schedule(config)(state["step"])
  metrics = jax.tree.map(jnp.mean, metrics) | {
    "gradient_norm": optax.global_norm(gradient), "learning_rate": rate}
  return {"params": optax.apply_updates(state["params"], updates),
          "optimizer": moments, "step": state["step"] + 1}, metrics


def _when_ready(compiling: futures.Future, *args):
  """Calls what `compiling` results in."""
  return compiling.result()(*args)


class GistTrainer:
  """The training loop around `train_step`.

  Args:
    lm: the frozen base (`load_base_lm`).
    gist_config: the network's sizes.
    config: the run.
    stores: {kind: TokenStore} of the training split.
    weights: {kind: weight} of the mixture; equal if None.
    workdir: holds checkpoints, metrics and the best weights.
    initial: parameters to start from; fresh ones if None.
    controls: folder of the evaluation's control losses; in workdir if None.
  """

  def __init__(self, lm, gist_config: gistnet.GistNetConfig,
               config: TrainConfig, stores: Mapping[str, data.TokenStore],
               workdir, weights: Mapping[str, float] | None = None,
               initial=None, controls=None):
    self.config, self.gist_config, self._lm = config, gist_config, lm
    self.workdir = pathlib.Path(workdir)
    self.controls = pathlib.Path(controls or self.workdir / "controls")
    self.mesh = sharding.make_mesh(config.mesh_data, config.mesh_model)
    spread = self.mesh.shape[sharding.DATA]
    if config.micro_batch % spread:
      raise McjaxError(f"micro_batch={config.micro_batch} does not divide "
                       f"among data={spread} devices")
    windows = {o.window for p in config.phases for o in p.turns}
    self._samplers = {w: data.WindowSampler(stores, w, weights, config.seed)
                      for w in windows}
    start = gistnet.init_params(gist_config, config.seed)
    state = init_state(config, start if initial is None else initial)
    whole = sharding.replicated(self.mesh)
    self._state_sharding = jax.tree.map(lambda _: whole, state)
    self.state = jax.device_put(state, self._state_sharding)
    base_sharding = sharding.BASE_RULES.shardings(lm.params, self.mesh)
    self._base = jax.device_put(lm.params, base_sharding)
    self._steps: dict[Objective, Callable] = {}
    plain = json.loads(json.dumps({
      "gistnet": dataclasses.asdict(gist_config), "base": lm.fingerprint,
      "seed": config.seed, "batch": config.batch,
      "train": dataclasses.asdict(config)}))
    self._checkpoints = Checkpoints(self.workdir / "checkpoints", plain)
    restored = self._checkpoints.restore(
      self.state, must_match=("gistnet", "base", "seed", "batch"))
    if restored is not None:
      self.state = restored
    self._bench: recovery.Bench | None = None
    self._ahead: tuple[int, jax.Array] | None = None

  @property
  def step(self) -> int:
    """Optimizer steps done."""
    return int(self.state["step"])

  def _batch(self, step: int) -> jax.Array:
    """Ids [micro-batches, micro_batch, window] on the mesh."""
    c = self.config
    parts = c.batch // c.micro_batch
    sampler = self._samplers[c.objective(step).window]
    rows = [sampler.batch(step * parts + i, c.micro_batch,
                                jax.process_index(), jax.process_count())
            for i in range(parts)]
    return sharding.global_batch(np.stack(rows), self.mesh, axis=1)

  def _compiled(self, objective: Objective) -> Callable:
    if objective not in self._steps:
      whole = sharding.replicated(self.mesh)
      self._steps[objective] = jax.jit(
        functools.partial(
          train_step, config=self.config, gist_config=self.gist_config,
          base_config=self._lm.config, objective=objective),
        donate_argnums=0, out_shardings=(self._state_sharding, whole))
    return self._steps[objective]

  def compile_ahead(self, pool: futures.Executor) -> None:
    """Starts to compile the steps of all objectives still to come.

    On an accelerator a compilation may take minutes; the first objective does
    not wait for the others.
    """
    ahead: dict[Objective, int] = {}
    for step in range(self.step, self.config.steps):
      ahead.setdefault(self.config.objective(step), step)
    for objective, step in ahead.items():
      shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
        (self.state, self._base, self._batch(step)))
      compiling = pool.submit(
        lambda run, shapes: run.lower(*shapes).compile(),
        self._compiled(objective), shapes)
      self._steps[objective] = functools.partial(_when_ready, compiling)

  def one_step(self) -> dict[str, float]:
    """Runs the next optimizer step; returns its metrics."""
    step = self.step
    run = self._compiled(self.config.objective(step))
    known, batch = self._ahead or (None, None)
    if known != step:
      batch = self._batch(step)
    self.state, metrics = run(self.state, self._base, batch)
    if step + 1 < self.config.steps:  # read while the device is busy
      self._ahead = step + 1, self._batch(step + 1)
    return {k: float(v) for k, v in jax.device_get(metrics).items()}

  def encoder(self) -> gistnet.GistEncoder:
    """The current weights bound to the base."""
    return gistnet.GistEncoder(
      self._lm, jax.device_get(self.state["params"]), self.gist_config, True)

  def measure(self, stores: Mapping[str, data.TokenStore]
              ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Losses {variant: [documents]} of 8 blocks before 48 tokens, and kinds."""
    if self._bench is None:
      setting = recovery.Setting(
        sink=self.config.phases[-1].turns[0].sink,
        gist_stride=self.config.phases[-1].turns[0].gist_stride)
      self._bench = recovery.Bench(self._lm, recovery.pick_excerpts(
        stores, setting.length, self.config.validation_documents), setting,
        cache=self.controls)
    losses = recovery.over_horizon(self._bench.measure(self.encoder()))
    return losses, self._bench.excerpts.kinds

  def evaluate(self, stores: Mapping[str, data.TokenStore]) -> dict:
    """`recovery.summarise` of `measure`."""
    return recovery.summarise(*self.measure(stores))

  def export(self, path, card: Mapping[str, Any]) -> None:
    """Writes the current weights with the facts of `card`."""
    phase = self.config.phases[-1]
    gistnet.save_gistnet(
      path, jax.device_get(self.state["params"]), self.gist_config,
      {"base": self._lm.name, "base_fingerprint": self._lm.fingerprint,
       "steps": self.step,
       "tokens": self.config.tokens(self.step),
       "phase": dataclasses.asdict(phase), **card})

  def run(self, validation: Mapping[str, data.TokenStore] | None = None,
          report: Callable[[str], None] = tqdm.tqdm.write) -> bool:
    """Trains to the last step, or to a signal, and checkpoints.

    Args:
      validation: stores for the periodic evaluation; the best weights by it
        are kept as `best.safetensors`.
      report: receives one line per evaluation.

    Returns:
      whether the run is finished (False: stopped by a signal).
    """
    c = self.config
    metrics = MetricWriter(self.workdir, self.step)
    best_path = self.workdir / "best.json"
    best = json.loads(best_path.read_text()) if best_path.exists() else {}
    bar = tqdm.tqdm(total=c.steps, initial=self.step, unit="step",
                    dynamic_ncols=True)
    with StopSignal() as stop, futures.ThreadPoolExecutor() as pool:
      self.compile_ahead(pool)
      while self.step < c.steps and not stop.raised:
        began = time.perf_counter()
        values = self.one_step()
        step = self.step
        tokens = c.batch * c.objective(step - 1).window
        rate = tokens / (time.perf_counter() - began)
        bar.update()
        bar.set_postfix_str(f"loss {values['loss']:.3f} {rate:.0f} tok/s")
        if not np.isfinite(values["loss"]):
          raise McjaxError(f"loss is not finite at step {step}")
        if step % c.log_every == 0:
          metrics.write(step, values | {"tokens_per_second": rate})
        last = step == c.steps or stop.raised
        if step % c.save_every == 0 or last:
          self._checkpoints.save(step, self.state, wait=last)
        if validation and c.validation_documents and not stop.raised and (
            step % c.evaluate_every == 0 or step == c.steps):
          summary = self.evaluate(validation)
          found = {k: v["value"] for k, v in summary["recovered"].items()}
          metrics.write(step, {f"recovered/{k}": v for k, v in found.items()})
          report(f"step {step}: recovered {found['gist']:.3f} (last token "
                 f"{found['last']:.3f}, mean {found['mean']:.3f}, shuffled "
                 f"{found['shuffled']:.3f})")
          if found["gist"] > best.get("recovered", -np.inf):
            best = {"step": step, "recovered": found["gist"]}
            self.export(self.workdir / "best.safetensors",
                        {"validation": summary})
            best_path.write_text(json.dumps(best))
    bar.close()
    metrics.close()
    self._checkpoints.close()
    return self.step >= c.steps
