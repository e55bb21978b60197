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

from mcjax import pretrained
from mcjax.lens import network as lensnet
from mcjax.lens import policy as lensnet_policy
from mcjax.lens.features import RAW, LensInputs
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.training.common.metrics import MetricWriter
from mcjax.training.common.ranks import spearman
from mcjax.training.common.stop_signal import StopSignal
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


@functools.partial(
  jax.jit, static_argnames=("config", "lens", "objective"), donate_argnums=0)
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
    start = initial or lensnet.init_params(lens, config.seed)
    start = {name: start[name] for name in ("score", "keys")}  # and no table
    start = jax.tree.map(lambda a: jnp.array(a, copy=True), start)
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

  @property
  def step(self) -> int:
    """Optimizer steps done."""
    return int(np.asarray(self.state["step"]))

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
    self.state, terms = train_step(
      self.state, self._embed, self._windows, self._pairs,
      rows.astype(np.int32), asked.astype(np.int32), config=c, lens=self.lens,
      objective=self.objective)
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
    best_path = self.workdir / "best.json"
    best = json.loads(best_path.read_text()) if best_path.exists() else {}
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
          if found["regret"] < best.get("regret", np.inf):
            best = {"step": step, **found}
            self._keep_best(best)
    bar.close()
    metrics.close()
    self._checkpoints.close()
    return self.step >= c.steps

  def _keep_best(self, facts: dict[str, float]) -> None:
    lensnet_policy.save_lensnet(
      self.workdir / "best.safetensors", self.params, self.lens, {})
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
    """Writes the best weights with the facts of `card`."""
    lensnet_policy.save_lensnet(
      path, self.best_params(), self.lens,
      {"base": self._lm.name, "base_fingerprint": self._lm.fingerprint,
       "gistnet": self._encoder.fingerprint, "steps": self.step,
       "windows": int(self._windows.worth.shape[0]), **card})


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
