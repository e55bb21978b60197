"""Trains GistNet beside a frozen base: one jitted step under a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent import futures
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mcjax.base import fused_attention
from mcjax.gist import encoder as gistnet
from mcjax.gist import lora
from mcjax.gist import weights as gist_weights
from mcjax.parallel import processes, sharding
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.parallel.places import place
from mcjax.parallel.sharding import RULES
from mcjax.training.common import data, loop, speed
from mcjax.training.gist import (
  foreign_loss,
  key_value_loss,
  level_loss,
  loop_loss,
  losses,
  recovery,
)
from mcjax.training.gist.losses import Objective
from mcjax.training.gist.run_config import (
  Phase,
  TrainConfig,
  init_state,
  optimizer,
  read_config,
  schedule,
)
from mcjax.types import McjaxError

__all__ = ["GistTrainer", "Phase", "TrainConfig", "make_mesh", "read_config",
           "train_step"]


def make_mesh(config: TrainConfig):
  """The mesh of a run, over the devices of all its processes."""
  return sharding.make_mesh(
    config.mesh_data, config.mesh_fsdp, config.mesh_tensor)


def train_step(state, base_params, ids, *, config: TrainConfig, gist_config,
               base_config, objective: Objective):
  """One optimizer step on ids [micro-batches, windows, window].

  A pure function of the state and the ids: the randomness of the objective
  comes from the seed and the step counter.

  Returns:
    the next state, and metrics averaged over all windows.
  """
  loss = level_loss if objective.level == 2 else losses
  if objective.loop:
    loss = loop_loss
  if objective.key_value:
    loss = key_value_loss
  if objective.foreign:
    loss, ids = foreign_loss, foreign_loss.exchange(ids, objective)
  root = jax.random.fold_in(jax.random.key(config.seed), state["step"])
  keys = jax.random.split(root, ids.shape[:2])

  def mean_loss(params, ids, keys):
    values, metrics = jax.vmap(lambda ids, key: loss.window_loss(
      params, gist_config, base_params, base_config, objective, ids, key)
    )(ids, keys)
    return jnp.mean(values), metrics

  def micro(total, piece):
    (_, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
      state["params"], *piece)
    return jax.tree.map(jnp.add, total, gradient), metrics

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
    lm: the frozen base (`load_base_lm`), whole or already on the run's mesh.
    gist_config: the network's sizes.
    config: the run.
    stores: {kind: TokenStore} of the training split.
    weights: {kind: weight} of the mixture; equal if None.
    workdir: holds checkpoints, metrics and the best weights; many processes
      need one that all of them see.
    initial: parameters to start from; fresh ones if None.
    controls: folder of the evaluation's control losses; in workdir if None.
    mesh: of the run; `make_mesh(config)` if None.

  Attributes:
    step: optimizer steps launched.
    state: parameters, optimizer state and step, on the mesh.
  """

  def __init__(self, lm, gist_config: gistnet.GistNetConfig,
               config: TrainConfig, stores: Mapping[str, data.TokenStore],
               workdir, weights: Mapping[str, float] | None = None,
               initial=None, controls=None, mesh=None):
    self.config, self.gist_config, self._lm = config, gist_config, lm
    self.workdir = place(workdir)
    self.controls = place(controls or self.workdir / "controls")
    self.mesh = make_mesh(config) if mesh is None else mesh
    spread = RULES.batch_devices(self.mesh)
    if config.micro_batch % spread:
      raise McjaxError(f"micro_batch={config.micro_batch} does not divide "
                       f"among data × fsdp = {spread} devices")
    objectives = [o for p in config.phases for o in p.turns]
    platform = self.mesh.devices.flat[0].platform
    for o in objectives:
      fused_attention.check(o.attention, lm.config, o.activations, platform)
    windows = {o.window for o in objectives}
    self._samplers = {w: data.WindowSampler(stores, w, weights, config.seed)
                      for w in windows}
    start = gist_weights.init_params(gist_config, config.seed)
    state = init_state(config, start if initial is None else initial)
    self._state_sharding = RULES.shardings(
      "gistnet", state, self.mesh, lead=int(gist_config.per_level))
    self.state = sharding.put(state, self._state_sharding)
    self._base = sharding.put(
      lm.params, RULES.shardings("base", lm.params, self.mesh))
    self._steps: dict[Objective, Callable] = {}
    # The teacher's pass; the student's, and back through its activations.
    self._flops_per_token = 3 * (
      lm.config.flops_per_token + gistnet.flops_per_token(gist_config))
    # Communication waits 30 s for those who load longer; the barrier for hours.
    processes.barrier("the base is loaded")
    self._checkpoints = self._open_checkpoints(stores, weights)
    self.step = int(self.state["step"])
    self._bench: recovery.Bench | None = None
    self._ahead: tuple[int, jax.Array] | None = None

  def _open_checkpoints(self, stores, weights) -> Checkpoints:
    """The workdir's checkpoints, the newest of them restored."""
    c = self.config
    plain = json.loads(json.dumps({
      "gistnet": dataclasses.asdict(self.gist_config),
      "base": self._lm.fingerprint, "seed": c.seed, "batch": c.batch,
      "schedule": c.schedule(), "data": data.fingerprint(stores, weights)}))
    checkpoints = Checkpoints(
      self.workdir / "checkpoints", plain, c.keep, c.keep_every)
    fixed = ("gistnet", "base", "seed", "batch")
    restored = checkpoints.restore(
      self.state, must_match=fixed,
      may_not_change=() if c.accept_changes else ("data", "schedule"))
    if restored is not None:
      self.state = restored
    return checkpoints

  def _batch(self, step: int) -> jax.Array:
    """Ids [micro-batches, micro_batch, window] on the mesh."""
    c = self.config
    sampler = self._samplers[c.objective(step).window]
    shape = (c.batch // c.micro_batch, c.micro_batch,
             c.objective(step).window)
    return sharding.global_rows(
      shape, RULES.batch_sharding(self.mesh, axis=1),
      lambda i, j: sampler.sample(step * c.batch + i * c.micro_batch + j))

  def _compiled(self, objective: Objective) -> Callable:
    if objective not in self._steps:
      whole = sharding.replicated(self.mesh)
      self._steps[objective] = jax.jit(
        functools.partial(
          train_step, config=self.config, gist_config=self.gist_config,
          base_config=dataclasses.replace(
            self._lm.config, attention=objective.attention),
          objective=objective),
        donate_argnums=0, out_shardings=(self._state_sharding, whole))
    return self._steps[objective]

  def compile_ahead(self, pool: futures.Executor) -> list[futures.Future]:
    """Starts to compile the steps of all objectives still to come.

    On an accelerator a compilation may take minutes; the first objective does
    not wait for the others.

    Returns:
      the programs to be, the next step's first.
    """
    programs = []
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
      programs.append(compiling)
    return programs

  def launch(self) -> dict[str, jax.Array]:
    """Starts the next optimizer step; its metrics, still being computed."""
    step = self.step
    run = self._compiled(self.config.objective(step))
    known, batch = self._ahead or (None, None)
    if known != step:
      batch = self._batch(step)
    self.state, metrics = run(self.state, self._base, batch)
    self.step = step + 1
    if step + 1 < self.config.steps:  # read while the device is busy
      self._ahead = step + 1, self._batch(step + 1)
    return metrics

  def one_step(self) -> dict[str, float]:
    """Runs the next optimizer step; returns its metrics."""
    return {k: float(v) for k, v in jax.device_get(self.launch()).items()}

  def rates(self, step: int, seconds: float) -> dict[str, float]:
    """Tokens a second of a step that took so long, and its MFU."""
    tokens = self.config.batch * self.config.objective(step - 1).window
    return speed.rates(tokens, tokens * self._flops_per_token, seconds,
                       self.config.peak_tflops)

  def params(self):
    """The current parameters as host arrays; all processes call it."""
    return sharding.fetch(self.state["params"])

  def encoder(self) -> gistnet.GistEncoder:
    """The current weights bound to the base; all processes call it."""
    lm, embed = self._lm, self._base["embed"]
    if not embed.is_fully_addressable:  # gists are written by each process
      if self.gist_config.input_layer:
        raise McjaxError("GistNetConfig.input_layer needs a base that every "
                         "process holds whole")
      lm = dataclasses.replace(lm, params={"embed": sharding.fetch(embed)})
    return gistnet.GistEncoder(lm, self.params(), self.gist_config, True)

  def measure(self, stores: Mapping[str, data.TokenStore]
              ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Losses {variant: [documents]} of 8 blocks before 48 tokens, and kinds."""
    if self._bench is None:
      setting = recovery.Setting(
        sink=self.config.phases[-1].turns[0].sink,
        gist_stride=self.config.phases[-1].turns[0].gist_stride)
      on_mesh = dataclasses.replace(self._lm, params=self._base)
      self._bench = recovery.Bench(on_mesh, recovery.pick_excerpts(
        stores, setting.length, self.config.validation_documents), setting,
        cache=self.controls)
    found = self._bench.measure(self.encoder())
    if self.gist_config.key_value:
      found["key_value"] = key_value_loss.score(
        self._base, self._lm.config,
        self.state["params"]["adapter"]["key_value"], self._bench.excerpts,
        self._bench.setting)
    return recovery.over_horizon(found), self._bench.excerpts.kinds

  def evaluate(self, stores: Mapping[str, data.TokenStore]) -> dict:
    """`recovery.summarise` of `measure`."""
    return recovery.summarise(*self.measure(stores))

  def export(self, path, card: Mapping[str, Any]) -> None:
    """Writes the current weights with the facts of `card`, on process 0."""
    phase, params = self.config.phases[-1], self.params()
    if processes.is_first():
      gist_weights.save_gistnet(
        path, params, self.gist_config,
        {"base": self._lm.name, "base_fingerprint": self._lm.fingerprint,
         "steps": self.step,
         "tokens": self.config.tokens(self.step),
         "phase": dataclasses.asdict(phase), **card})

  def export_lora(self, folder) -> None:
    """Writes the current LoRA in PEFT's layout, on process 0."""
    params = self.params()
    if processes.is_first():
      lora.save(folder, params.get("adapter", {}), self._lm.name)

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
    evaluate = None
    if validation and c.validation_documents:
      evaluate = functools.partial(self._validate, validation)
    with futures.ThreadPoolExecutor() as pool:
      programs = self.compile_ahead(pool)
      if programs and processes.is_first():
        report("compiling the training step: minutes on a CPU, unless it is "
               "kept from an earlier run")
        report(speed.memory_line(programs[0].result()))
      return loop.run(
        self, loop.Cadence(c.steps, c.log_every, c.save_every,
                           c.evaluate_every, c.wandb),
        self.workdir, self._checkpoints, evaluate, report)

  def _validate(self, stores, step: int) -> tuple[dict[str, float], str]:
    """Metrics and a line; the best weights so far are kept."""
    summary = self.evaluate(stores)
    found = {k: v["value"] for k, v in summary["recovered"].items()}
    path = self.workdir / "best.json"
    best = json.loads(path.read_text()) if path.exists() else {}
    processes.barrier("the best so far is read")
    kind = "key_value" if self.gist_config.key_value else "gist"
    if found[kind] > best.get("recovered", -np.inf):
      self.export(self.workdir / "best.safetensors", {"validation": summary})
      if processes.is_first():
        path.write_text(json.dumps(
          {"step": step, "recovered": found[kind]}))
    others = ", ".join(f"{name} {found[name]:.3f}" for name in
                       ("last", "mean", "shuffled") if name in found)
    return {f"recovered/{k}": v for k, v in found.items()}, (
      f"recovered {found[kind]:.3f} (controls: {others}; "
      f"{summary['documents']} documents)")
