"""Trains LensNet on labelled windows: one jitted step, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mcjax import pretrained
from mcjax.lens import network as lensnet
from mcjax.lens import policy as lensnet_policy
from mcjax.lens.features import RAW, LensInputs
from mcjax.parallel import processes, sharding
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.parallel.sharding import RULES
from mcjax.training.common import loop
from mcjax.training.common.ranks import spearman
from mcjax.training.lens import losses as lens_losses
from mcjax.training.lens.labels import Labelled
from mcjax.training.lens.losses import LensObjective, Pairs, Windows
from mcjax.types import McjaxError


@dataclasses.dataclass(frozen=True)
class LensTrainConfig:
  """A round of training; validated.

  Attributes:
    steps: optimizer steps.
    batch: windows per step.
    pairs: made-up questions per step, and as many random blocks four times.
    learning_rate: peak; linear warm-up, cosine decay.
    warmup: steps.
    weight_decay, clip: of AdamW and the global norm.
    seed: of order and initialisation.
    log_every, evaluate_every, save_every: steps between records.
    keep: checkpoints kept, the newest.
    mesh_data, mesh_fsdp: mesh sizes; data -1 takes what is left.
  """

  steps: int = 1500
  batch: int = 16
  pairs: int = 48
  learning_rate: float = 1e-3
  warmup: int = 50
  weight_decay: float = 0.03
  clip: float = 1.0
  seed: int = 0
  log_every: int = 20
  evaluate_every: int = 100
  save_every: int = 100
  keep: int = 3
  mesh_data: int = -1
  mesh_fsdp: int = 1

  def __post_init__(self):
    for name in ("steps", "batch", "pairs", "log_every", "evaluate_every",
                 "save_every", "keep"):
      if getattr(self, name) < 1:
        raise McjaxError(f"config.train.{name} must be ≥ 1, got "
                         f"{getattr(self, name)}")

  def schedule(self) -> dict[str, Any]:
    """What the course of training depends on, as plain values."""
    idle = ("log_every", "evaluate_every", "save_every", "keep", "mesh_data",
            "mesh_fsdp")
    return {k: v for k, v in dataclasses.asdict(self).items() if k not in idle}


def optimizer(c: LensTrainConfig) -> optax.GradientTransformation:
  """AdamW with global norm clipping; matrices only are decayed."""
  rate = optax.warmup_cosine_decay_schedule(
    0.0, c.learning_rate, c.warmup, max(c.steps, c.warmup + 1),
    0.05 * c.learning_rate)
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    optax.adamw(rate, weight_decay=c.weight_decay,
                mask=lambda p: jax.tree.map(lambda a: np.ndim(a) > 1, p)))


def train_step(state, embed, windows: Windows, pairs: Pairs, *,
               config: LensTrainConfig, lens: lensnet.LensNetConfig,
               objective: LensObjective):
  """One step on a batch of windows and pairs.

  Returns:
    the next state and [] float32 metrics.
  """
  (_, terms), gradient = jax.value_and_grad(
    lambda p: lens_losses.loss(p, lens, objective, embed, windows, pairs),
    has_aux=True)(state["params"])
  with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
    updates, moments = optimizer(config).update(
      gradient, state["optimizer"], state["params"])
  return {"params": optax.apply_updates(state["params"], updates),
          "optimizer": moments, "step": state["step"] + 1}, terms


class LensTrainer:
  """One round of training on labelled windows.

  Args:
    lm: the frozen base.
    encoder: its GistNet.
    lens: sizes of LensNet.
    config, objective: see there.
    windows: labelled, for training; the same in all processes.
    pairs: made-up questions, at least `config.pairs`.
    workdir: of checkpoints and metrics.
    initial: parameters to start from; fresh ones if None.
    mesh: of the run; all devices of all processes if None.

  Attributes:
    step: optimizer steps launched.
    state: parameters, optimizer state and step, on the mesh.
  """

  def __init__(self, lm, encoder, lens: lensnet.LensNetConfig,
               config: LensTrainConfig, objective: LensObjective,
               windows: Sequence[Labelled], pairs: Pairs, workdir,
               initial=None, mesh=None):
    self.config, self.lens, self.objective = config, lens, objective
    self.workdir = pathlib.Path(workdir)
    self._lm, self._encoder = lm, encoder
    self.mesh = sharding.make_mesh(
      config.mesh_data, config.mesh_fsdp) if mesh is None else mesh
    if config.batch % RULES.batch_devices(self.mesh):
      raise McjaxError(f"config.train.batch={config.batch} does not divide "
                       f"among {RULES.batch_devices(self.mesh)} devices")
    self._embed_host = np.asarray(lm.params["embed"], np.float32)
    self._windows = lens_losses.stack(windows, self._embed_host, encoder)
    self._pairs = pairs
    whole = sharding.replicated(self.mesh)
    self._embed = sharding.put(self._embed_host, whole)
    start = initial or lensnet.init_params(lens, config.seed)
    start = {name: start[name] for name in ("score", "keys")}  # and no table
    start = jax.tree.map(lambda a: jnp.array(a, copy=True), start)
    state = {"params": start, "optimizer": optimizer(config).init(start),
             "step": jnp.zeros((), jnp.int32)}
    self._state_sharding = RULES.shardings("lensnet", state, self.mesh)
    self.state = sharding.put(state, self._state_sharding)
    plain = json.loads(json.dumps({
      "lens": dataclasses.asdict(lens), "base": lm.fingerprint,
      "windows": len(windows), "train": config.schedule(),
      "objective": dataclasses.asdict(objective)}))
    self._checkpoints = Checkpoints(
      self.workdir / "checkpoints", plain, config.keep)
    restored = self._checkpoints.restore(
      self.state, must_match=tuple(plain))
    if restored is not None:
      self.state = restored
    self.step = int(self.state["step"])
    self._run = jax.jit(
      functools.partial(train_step, config=config, lens=lens,
                        objective=objective),
      donate_argnums=0, out_shardings=(self._state_sharding, whole))

  @property
  def params(self):
    """Current parameters on the host; all processes ask for them."""
    return sharding.fetch(self.state["params"])

  def launch(self) -> dict[str, jax.Array]:
    """Starts the next step; its data are a function of the seed and the step.
    """
    c = self.config
    rng = np.random.default_rng([c.seed, 5, self.step])
    count = len(self._windows.worth)
    rows = rng.choice(count, c.batch, replace=count < c.batch)
    asked = rng.choice(len(self._pairs.questions), c.pairs, replace=False)
    batch = jax.tree.map(lambda a: a[rows], self._windows)
    chosen = Pairs(self._pairs.questions[asked], self._pairs.blocks[asked],
                   self._pairs.others)
    split = RULES.batch_sharding(self.mesh)
    whole = sharding.replicated(self.mesh)
    self.state, terms = self._run(
      self.state, self._embed,
      sharding.put(batch, jax.tree.map(lambda _: split, batch)),
      sharding.put(chosen, jax.tree.map(lambda _: whole, chosen)))
    self.step += 1
    return terms

  def one_step(self) -> dict[str, float]:
    """Runs the next step; returns its metrics."""
    return {k: float(v) for k, v in jax.device_get(self.launch()).items()}

  def rates(self, step: int, seconds: float) -> dict[str, float]:
    """Steps a second."""
    del step
    return {"steps_per_second": 1 / seconds}

  def run(self, validation: Sequence[Labelled] = (),
          report: Callable[[str], None] = tqdm.tqdm.write) -> bool:
    """Trains to the last step, or to a signal; False if it was stopped."""
    c = self.config
    judge = None
    if validation:
      judge = functools.partial(self._validate, lens_losses.stack(
        validation, self._embed_host, self._encoder))
    return loop.run(
      self, loop.Cadence(c.steps, c.log_every, c.save_every,
                         c.evaluate_every),
      self.workdir, self._checkpoints, judge, report)

  def _validate(self, held: Windows, step: int) -> tuple[dict[str, float], str]:
    """Metrics and a line; the best weights so far are kept."""
    params = self.params
    found = evaluate(params, self.lens, self._embed_host, held)
    path = self.workdir / "best.json"
    if processes.is_first():
      best = json.loads(path.read_text()) if path.exists() else {}
      if found["regret"] < best.get("regret", np.inf):
        self._keep_best(params, {"step": step, **found})
    processes.barrier("the best so far is kept")
    return {f"validation/{k}": v for k, v in found.items()}, ", ".join(
      f"{k} {v:.3f}" for k, v in found.items())

  def _keep_best(self, params, facts: dict[str, float]) -> None:
    lensnet_policy.save_lensnet(
      self.workdir / "best.safetensors", params, self.lens, {})
    (self.workdir / "best.json").write_text(json.dumps(facts))

  def best_params(self):
    """Parameters with the lowest regret on the validation windows so far.

    The current ones if nothing was validated.
    """
    path = self.workdir / "best.safetensors"
    if not path.exists():
      return self.params
    return pretrained.read_weights(path, "lensnet")[0]

  def export(self, path, card: Mapping[str, Any]) -> None:
    """Writes the best weights with the facts of `card`, on process 0."""
    params = self.best_params()
    if not processes.is_first():
      return
    lensnet_policy.save_lensnet(
      path, params, self.lens,
      {"base": self._lm.name, "base_fingerprint": self._lm.fingerprint,
       "gistnet": self._encoder.fingerprint, "steps": self.step,
       "windows": len(self._windows.worth), **card})


def window_scores(params, lens: lensnet.LensNetConfig, embed,
                  windows: Windows) -> np.ndarray:
  """Scores [N, R] of stacked windows."""
  tables = lensnet.key_tables(params, lens, embed)
  rows = [
    _scores(params, lens, tables, LensInputs(*(a[i] for a in windows.inputs)))
    for i in range(len(windows.worth))]
  return np.stack(jax.device_get(rows))


@functools.partial(jax.jit, static_argnames="lens")
def _scores(params, lens, tables, inputs: LensInputs) -> jax.Array:
  return lensnet.apply(
    params, lens, inputs, lens_losses.matches(tables, inputs))


def evaluate(params, lens: lensnet.LensNetConfig, embed, windows: Windows,
             edits: int = 4, threshold: float = 0.2) -> dict[str, float]:
  """How scores agree with labels.

  Returns:
    spearman, asked/spearman: rank correlation of score and worth over the
      labelled blocks of windows that follow text, and of questions.
    cheap: rank correlation of the cheap estimate and the worth.
    regret, text/regret: the best sum of gains of `edits` labelled edits minus
      that of the edits wished for, over all windows and over those that
      follow text, relative to making no edits.
    found: of the questions whose best hidden block is worth more than the
      threshold's worth, the share in which it is wished for.
  """
  scores = window_scores(params, lens, embed, windows)
  known = np.isfinite(windows.worth)
  worth = np.where(known, windows.worth, 0)
  asked = np.asarray(windows.inputs.asked) > 0
  raw = windows.inputs.state == RAW
  sign = np.where(raw, -1, 1)
  best, got, found = np.zeros(len(worth)), np.zeros(len(worth)), []
  for i, (s, w, k, g) in enumerate(zip(scores, worth, known, sign)):
    gain, wish = (g * w)[k], (g * s)[k]
    best[i] = np.sort(np.maximum(gain, 0))[-edits:].sum()
    order = np.argsort(-wish)[:edits]
    got[i] = gain[order][wish[order] > threshold].sum()
    hidden = np.where(k & ~raw[i], w, -np.inf)
    if asked[i] and hidden.max() > 2 * threshold * lens_losses.UNIT:
      found.append(s[hidden.argmax()] > threshold)
  both = known & np.isfinite(windows.cheap)

  def regret(some: np.ndarray) -> float:
    total = best[some].sum()
    return float((total - got[some].sum()) / max(total, 1e-9))

  def agreement(some: np.ndarray) -> float:
    k = known & some[:, None]
    return spearman(scores[k], worth[k])

  return {
    "spearman": agreement(~asked), "asked/spearman": agreement(asked),
    "cheap": spearman(windows.cheap[both], worth[both]),
    "regret": regret(np.ones_like(asked)), "text/regret": regret(~asked),
    "found": float(np.mean(found)) if found else 0.0,
  }
