"""Trains LensNet on labelled windows: one jitted step, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
import tqdm

from mcjax import lensnet, pretrained
from mcjax.checkpoint import Checkpoints
from mcjax.evaluation.ranks import spearman
from mcjax.lens_rows import RAW, LensInputs
from mcjax.training import lens_losses
from mcjax.training.focus_labels import Labelled
from mcjax.training.lens_losses import LensObjective, Pairs, Windows
from mcjax.training.metrics import MetricWriter
from mcjax.training.stop_signal import StopSignal
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

  def __post_init__(self):
    for name in ("steps", "batch", "pairs", "log_every", "evaluate_every",
                 "save_every"):
      if getattr(self, name) < 1:
        raise McjaxError(f"config.train.{name} must be ≥ 1, got "
                         f"{getattr(self, name)}")


def optimizer(c: LensTrainConfig) -> optax.GradientTransformation:
  """AdamW with global norm clipping; matrices only are decayed."""
  rate = optax.warmup_cosine_decay_schedule(
    0.0, c.learning_rate, c.warmup, max(c.steps, c.warmup + 1),
    0.05 * c.learning_rate)
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    optax.adamw(rate, weight_decay=c.weight_decay,
                mask=lambda p: jax.tree.map(lambda a: np.ndim(a) > 1, p)))


def train_step(state, embed, windows: Windows, pairs: Pairs, rows, asked, *,
               config: LensTrainConfig, lens: lensnet.LensNetConfig,
               objective: LensObjective):
  """One step on windows `rows` [B] and pairs `asked` [P] of the data.

  Returns:
    the next state and [] float32 metrics.
  """
  batch = jax.tree.map(lambda a: a[rows], windows)
  chosen = Pairs(pairs.questions[asked], pairs.blocks[asked], pairs.others)
  (_, terms), gradient = jax.value_and_grad(
    lambda p: lens_losses.loss(p, lens, objective, embed, batch, chosen),
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
    windows: labelled, for training.
    pairs: made-up questions, at least `config.pairs`.
    workdir: of checkpoints and metrics.
    initial: parameters to start from; fresh ones if None.
  """

  def __init__(self, lm, encoder, lens: lensnet.LensNetConfig,
               config: LensTrainConfig, objective: LensObjective,
               windows: Sequence[Labelled], pairs: Pairs, workdir,
               initial=None):
    self.config, self.lens, self.objective = config, lens, objective
    self.workdir = pathlib.Path(workdir)
    self._lm, self._encoder = lm, encoder
    self._embed = jnp.asarray(lm.params["embed"], jnp.float32)
    self._windows = jax.device_put(lens_losses.stack(
      windows, np.asarray(self._embed), encoder))
    self._pairs = jax.device_put(pairs)
    start = lensnet.init_params(lens, config.seed)
    if initial is not None:
      start = jax.tree.map(jnp.asarray, initial)
    self.state = {"params": start, "optimizer": optimizer(config).init(start),
                  "step": jnp.zeros((), jnp.int32)}
    plain = json.loads(json.dumps({
      "lens": dataclasses.asdict(lens), "base": lm.fingerprint,
      "windows": len(windows), "train": dataclasses.asdict(config),
      "objective": dataclasses.asdict(objective)}))
    self._checkpoints = Checkpoints(self.workdir / "checkpoints", plain)
    restored = self._checkpoints.restore(
      self.state, must_match=tuple(plain))
    if restored is not None:
      self.state = restored
    self._step = jax.jit(functools.partial(
      train_step, config=config, lens=lens, objective=objective),
      donate_argnums=0)

  @property
  def step(self) -> int:
    """Optimizer steps done."""
    return int(self.state["step"])

  @property
  def params(self):
    """Current parameters on the host."""
    return jax.device_get(self.state["params"])

  def one_step(self) -> dict[str, float]:
    """Runs the next step; its data are a function of the seed and the step."""
    c = self.config
    rng = np.random.default_rng([c.seed, 5, self.step])
    count = self._windows.worth.shape[0]
    rows = rng.choice(count, c.batch, replace=count < c.batch)
    asked = rng.choice(len(self._pairs.questions), c.pairs, replace=False)
    self.state, terms = self._step(
      self.state, self._embed, self._windows, self._pairs,
      rows.astype(np.int32), asked.astype(np.int32))
    return {k: float(v) for k, v in jax.device_get(terms).items()}

  def run(self, validation: Sequence[Labelled] = (),
          report: Callable[[str], None] = tqdm.tqdm.write) -> bool:
    """Trains to the last step, or to a signal; False if it was stopped."""
    c = self.config
    held = None
    if validation:
      held = lens_losses.stack(
        validation, np.asarray(self._embed), self._encoder)
    metrics = MetricWriter(self.workdir, self.step)
    bar = tqdm.tqdm(total=c.steps, initial=self.step, unit="step",
                    dynamic_ncols=True)
    with StopSignal() as stop:
      while self.step < c.steps and not stop.raised:
        began = time.perf_counter()
        values = self.one_step()
        step = self.step
        bar.update()
        bar.set_postfix_str(f"loss {values['loss']:.3f}")
        if not np.isfinite(values["loss"]):
          raise McjaxError(f"loss is not finite at step {step}")
        if step % c.log_every == 0:
          metrics.write(step, values | {
            "steps_per_second": 1 / (time.perf_counter() - began)})
        last = step == c.steps or stop.raised
        if step % c.save_every == 0 or last:
          self._checkpoints.save(step, self.state, wait=last)
        if held is not None and (step % c.evaluate_every == 0 or last):
          found = evaluate(self.params, self.lens, self._embed, held)
          metrics.write(step, {f"validation/{k}": v for k, v in found.items()})
          report(f"step {step}: " + ", ".join(
            f"{k} {v:.3f}" for k, v in found.items()))
    bar.close()
    metrics.close()
    self._checkpoints.close()
    return self.step >= c.steps

  def export(self, path, card: Mapping[str, Any]) -> None:
    """Writes the weights with the facts of `card`."""
    pretrained.save_weights(
      path, "lensnet", self.params, dataclasses.asdict(self.lens),
      {"base": self._lm.name, "base_fingerprint": self._lm.fingerprint,
       "gistnet": self._encoder.fingerprint, "steps": self.step,
       "windows": int(self._windows.worth.shape[0]), **card})


def window_scores(params, lens: lensnet.LensNetConfig, embed,
                  windows: Windows) -> np.ndarray:
  """Scores [N, R] of stacked windows."""
  tables = lensnet.key_tables(params, lens, embed)

  @jax.jit
  def run(inputs):
    return lensnet.apply(
      params, lens, inputs, lens_losses.matches(tables, inputs))

  rows = [run(LensInputs(*(a[i] for a in windows.inputs)))
          for i in range(len(windows.worth))]
  return np.stack(jax.device_get(rows))


def evaluate(params, lens: lensnet.LensNetConfig, embed, windows: Windows,
             edits: int = 4, threshold: float = 0.2) -> dict[str, float]:
  """How scores agree with labels.

  Returns:
    spearman: rank correlation of score and worth over all labelled blocks.
    within: the same inside a window, averaged.
    cheap: rank correlation of the cheap estimate and the worth.
    regret: mean over windows of the best sum of gains of `edits` labelled
      edits minus that of the edits wished for, relative to making none.
  """
  scores = window_scores(params, lens, embed, windows)
  known = np.isfinite(windows.worth)
  worth = np.where(known, windows.worth, 0)
  sign = np.where(windows.inputs.state == RAW, -1, 1)
  within, best, got = [], [], []
  for s, w, k, g in zip(scores, worth, known, sign):
    if k.sum() > 4:
      within.append(spearman(s[k], w[k]))
    gain, wish = (g * w)[k], (g * s)[k]
    best.append(np.sort(np.maximum(gain, 0))[-edits:].sum())
    order = np.argsort(-wish)[:edits]
    got.append(gain[order][wish[order] > threshold].sum())
  both = known & np.isfinite(windows.cheap)
  return {
    "spearman": spearman(scores[known], worth[known]),
    "within": float(np.mean(within)) if within else 0.0,
    "cheap": spearman(windows.cheap[both], worth[both]),
    "regret": float((np.sum(best) - np.sum(got)) / max(np.sum(best), 1e-9)),
  }
