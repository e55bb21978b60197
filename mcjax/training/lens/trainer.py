"""Trains LensNet on windows made by construction, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mcjax.focus.policy import WISH
from mcjax.lens import network as lensnet
from mcjax.lens import weights as lens_weights
from mcjax.parallel import processes, sharding
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.parallel.places import place
from mcjax.parallel.sharding import RULES
from mcjax.training.common import loop
from mcjax.training.lens import losses as lens_losses
from mcjax.training.lens.losses import LensObjective, Targets
from mcjax.training.lens.windows import WindowSet
from mcjax.types import McjaxError

PARTS = ("score", "text")  # for prompts, and for text that is read on
_COURSE = ("steps", "batch", "learning_rate", "warmup", "weight_decay", "clip",
           "seed")  # settings that the course of training depends on
_BATCH = 32  # windows evaluated at once
_COUNTS = (4, 8, 16)  # blocks taken, where recall is told


@dataclasses.dataclass(frozen=True)
class LensTrainConfig:
  """A run; validated.

  Attributes:
    steps: optimizer steps.
    batch: windows per step, all of one kind.
    learning_rate: peak; linear warm-up, cosine decay.
    warmup: steps.
    weight_decay, clip: of AdamW and the global norm.
    seed: of order and initialisation.
    blend: share of what was trained in the weights that are exported; the rest
      is what the run started from, whose skills a short run keeps that way
      (arXiv:2109.01903).
    mesh_data, mesh_fsdp: mesh sizes; data -1 takes what is left.
    log_every, evaluate_every, save_every: steps between records.
    keep, keep_every, wandb, accept_changes: as of GistNet's `TrainConfig`.
  """

  steps: int = 3000
  batch: int = 24
  learning_rate: float = 2e-3
  warmup: int = 50
  weight_decay: float = 0.03
  clip: float = 1.0
  seed: int = 0
  blend: float = 1.0
  mesh_data: int = -1
  mesh_fsdp: int = 1
  log_every: int = 20
  evaluate_every: int = 500
  save_every: int = 100
  keep: int = 3
  keep_every: int = 0
  wandb: str = ""
  accept_changes: bool = False

  def __post_init__(self):
    for name in ("steps", "batch", "log_every", "evaluate_every", "save_every",
                 "keep"):
      if getattr(self, name) < 1:
        raise McjaxError(f"config.train.{name} must be ≥ 1, got "
                         f"{getattr(self, name)}")
    if not 0 < self.blend <= 1:
      raise McjaxError(
        f"config.train.blend must be in (0, 1], got {self.blend}")


def optimizer(c: LensTrainConfig) -> optax.GradientTransformation:
  """AdamW with global norm clipping; matrices only are decayed."""
  rate = optax.warmup_cosine_decay_schedule(
    0.0, c.learning_rate, c.warmup, max(c.steps, c.warmup + 1),
    0.03 * c.learning_rate)
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    optax.adamw(rate, weight_decay=c.weight_decay,
                mask=lambda p: jax.tree.map(lambda a: np.ndim(a) > 1, p)))


def train_step(state, inputs, targets: Targets, key, *, part: str,
               config: LensTrainConfig, lens: lensnet.LensNetConfig,
               objective: LensObjective):
  """One step of a part of the parameters on a batch.

  Returns:
    the next state and [] float32 metrics.
  """
  (_, terms), gradient = jax.value_and_grad(
    lambda p: lens_losses.loss(
      p, lens, objective, inputs, targets, key, part),
    has_aux=True)(state["params"])
  with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
    updates, moments = optimizer(config).update(
      gradient, state["optimizer"], state["params"])
  return {"params": optax.apply_updates(state["params"], updates),
          "optimizer": moments, "step": state["step"] + 1}, terms


class LensTrainer:
  """One run.

  Args:
    lm: the frozen base; its embeddings are read.
    lens: sizes of LensNet.
    config, objective: see there.
    windows: {kind: WindowSet} to learn from; the same in all processes.
    weights: {kind: share} of the steps.
    start: parameters to start from, with keys or a table.
    workdir: of checkpoints and metrics.
    gistnet: fingerprint of the GistNet whose gists the windows hold.
    mesh: of the run; all devices of all processes if None.

  Attributes:
    step: optimizer steps launched.
    state: parameters, optimizer state and step, on the mesh.
  """

  def __init__(self, lm, lens: lensnet.LensNetConfig, config: LensTrainConfig,
               objective: LensObjective, windows: Mapping[str, WindowSet],
               weights: Mapping[str, float], start: Mapping[str, Any], workdir,
               gistnet: str, mesh=None):
    self.config, self.lens, self.objective = config, lens, objective
    self.workdir = place(workdir)
    self._lm, self._start, self._gistnet = lm, dict(start), gistnet
    self._windows = {k: w for k, w in windows.items() if weights.get(k)}
    if not self._windows:
      raise McjaxError("config.mixture gives no kind of window any weight")
    share = np.array([weights[k] for k in self._windows])
    self._share = share / share.sum()
    self.mesh = sharding.make_mesh(
      config.mesh_data, config.mesh_fsdp) if mesh is None else mesh
    if config.batch % RULES.batch_devices(self.mesh):
      raise McjaxError(f"config.train.batch={config.batch} does not divide "
                       f"among {RULES.batch_devices(self.mesh)} devices")
    self._embed = np.asarray(lm.params["embed"], np.float32)
    taught = {part_of(kind) for kind in self._windows}  # decay harms others
    params = {part: normalised(self._start[part], self._windows, part)
              for part in PARTS if part in taught}
    state = {"params": params, "optimizer": optimizer(config).init(params),
             "step": jnp.zeros((), jnp.int32)}
    laid_out = RULES.shardings("lensnet", state, self.mesh)
    whole = sharding.replicated(self.mesh)
    self.state = sharding.put(state, laid_out)
    self._checkpoints, restored = self._open_checkpoints()
    if restored is not None:
      self.state = restored
    self.step = int(self.state["step"])
    self._run = jax.jit(
      functools.partial(train_step, config=config, lens=lens,
                        objective=objective), static_argnames="part",
      donate_argnums=0, out_shardings=(laid_out, whole))

  def _open_checkpoints(self) -> tuple[Checkpoints, dict | None]:
    """The workdir's checkpoints, and the newest state, if there is any."""
    c = self.config
    plain = json.loads(json.dumps({
      "lens": dataclasses.asdict(self.lens), "base": self._lm.fingerprint,
      "objective": dataclasses.asdict(self.objective),
      "schedule": {
        k: getattr(c, k) for k in _COURSE} | {"mixture": dict(
          zip(self._windows, self._share.tolist()))},
      "data": {k: w.digest() for k, w in self._windows.items()}}))
    checkpoints = Checkpoints(
      self.workdir / "checkpoints", plain, c.keep, c.keep_every)
    restored = checkpoints.restore(
      self.state, must_match=("lens", "base", "objective"),
      may_not_change=() if c.accept_changes else ("schedule", "data"))
    return checkpoints, restored

  def launch(self) -> dict[str, jax.Array]:
    """Starts the next step; its data are a function of the seed and the step.
    """
    c = self.config
    rng = np.random.default_rng([c.seed, 5, self.step])
    kind = list(self._windows)[rng.choice(len(self._share), p=self._share)]
    windows = self._windows[kind]
    rows = rng.integers(0, len(windows), c.batch)
    batch = windows.inputs(rows, self._embed), windows.targets(rows)
    split, whole = RULES.batch_sharding(self.mesh), sharding.replicated(
      self.mesh)
    key = np.asarray(jax.random.key_data(jax.random.key(self.step)))
    self.state, terms = self._run(
      self.state,
      *sharding.put(batch, jax.tree.map(lambda _: split, batch)),
      jax.random.wrap_key_data(sharding.put(key, whole)),
      part=part_of(kind))
    self.step += 1
    return terms

  def one_step(self) -> dict[str, float]:
    """Runs the next step; returns its metrics."""
    return {k: float(v) for k, v in jax.device_get(self.launch()).items()}

  def rates(self, step: int, seconds: float) -> dict[str, float]:
    """Steps a second."""
    del step
    return {"steps_per_second": 1 / seconds}

  def run(self, validation: Mapping[str, WindowSet] | None = None,
          report: Callable[[str], None] = tqdm.tqdm.write) -> bool:
    """Trains to the last step, or to a signal; False if it was stopped."""
    c = self.config

    def validate(step: int) -> tuple[dict[str, float], str]:
      del step
      params = self._start | self.score_params
      params |= {"apart": np.zeros(len(lensnet.APART))}
      found = evaluate(params, self.lens, self._embed, validation or {})
      return ({f"validation/{k}": v for k, v in found.items()},
              ", ".join(f"{k} {v:.3f}" for k, v in found.items()))

    return loop.run(
      self, loop.Cadence(c.steps, c.log_every, c.save_every, c.evaluate_every,
                         c.wandb),
      self.workdir, self._checkpoints, validate if validation else None,
      report)

  @property
  def score_params(self) -> dict:
    """Current parameters that are taught, on the host; all processes ask."""
    return sharding.fetch(self.state["params"])

  def export(self, path, card: Mapping[str, Any]) -> dict:
    """Writes the weights with the facts of `card`, on process 0.

    Returns:
      the parameters written.
    """
    taught, share = self.score_params, self.config.blend
    if share < 1:
      taught = jax.tree.map(
        lambda new, old: np.asarray(share * new + (1 - share) * old, new.dtype),
        taught, {name: self._start[name] for name in taught})
    params = {"apart": np.zeros(len(lensnet.APART), np.float32),
              **self._start, **taught}
    if "score" in taught:
      params["apart"] = fit_apart(
        params, self.lens, self._embed, self._windows, self.config.seed)
    if processes.is_first():
      lens_weights.save_lensnet(
        path, params, self.lens,
        {"base": self._lm.name, "base_fingerprint": self._lm.fingerprint,
         "gistnet": self._gistnet, "steps": self.step,
         "windows": {k: len(w) for k, w in self._windows.items()},
         **json.loads(json.dumps(dict(card)))})
    return params


def part_of(kind: str) -> str:
  """The part of the parameters that a kind of window teaches."""
  return "text" if kind == "text" else "score"


def normalised(score: Mapping[str, Any], windows: Mapping[str, WindowSet],
               part: str):
  """A copy of the parameters that knows mean and scale of the features.

  What was trained before keeps those it was trained with.
  """
  out = jax.tree.map(lambda a: jnp.array(a, copy=True), dict(score))
  mean, scale = np.asarray(out["mean"]), np.asarray(out["scale"])
  new = scale == 0 if mean.any() else np.ones(len(mean), bool)
  if not new.any():
    return out
  seen = np.concatenate([
    w.features[::8][w.block[::8] >= 0] for kind, w in windows.items()
    if part_of(kind) == part or len(windows) == 1])
  seen = seen.astype(np.float32)
  out["mean"] = jnp.asarray(np.where(new, seen.mean(0), mean))
  out["scale"] = jnp.asarray(np.where(new, 1.0 / (seen.std(0) + 1e-2), scale))
  return out


@functools.partial(jax.jit, static_argnames="lens")
def _evaluated(score, inputs, *, lens):
  out = jax.vmap(
    lambda x: lensnet.evaluate({"score": score}, lens, x))(inputs)
  return out, jax.vmap(lensnet.overshadowed)(
    out.rank, inputs.block, inputs.mask)


def outputs(score, lens, embed, windows: WindowSet, most: int = 10**9):
  """`Scores` and shadows of at most so many windows, and which they are."""
  step = max(1, len(windows) // most)
  rows = np.arange(0, len(windows), step)
  parts = []
  for a in range(0, len(rows), _BATCH):
    some = rows[a : a + _BATCH]
    found = _evaluated(
      score, windows.inputs(np.resize(some, _BATCH), embed), lens=lens)
    parts.append([np.asarray(x)[: len(some)] for x in jax.tree.leaves(found)])
  rank, worth, answerable, shadow = (np.concatenate(p) for p in zip(*parts))
  return rows, lensnet.Scores(rank, worth, answerable), shadow


def fit_apart(params, lens, embed, windows: Mapping[str, WindowSet],
              seed: int) -> np.ndarray:
  """`losses.fit_apart` on a sample of the training windows."""
  ranks, shadows, golds = [], [], []
  for kind, some in windows.items():
    if part_of(kind) != "score":
      continue
    rows, out, shadow = outputs(params["score"], lens, embed, some, 600)
    gold = (some.gold[rows] > 0) & (some.block[rows] >= 0)
    asked = some.asked[rows] & gold.any(axis=1)
    ranks.append(out.rank[asked])
    shadows.append(shadow[asked])
    golds.append(gold[asked])
  if not sum(map(len, ranks)):
    return np.zeros(len(lensnet.APART), np.float32)
  rank = np.concatenate(ranks)
  return lens_losses.fit_apart(
    rank, np.concatenate(shadows), np.concatenate(golds), seed=seed)


def evaluate(params, lens, embed, windows: Mapping[str, WindowSet]
             ) -> dict[str, float]:
  """What the scores find, per kind of window.

  Returns:
    KIND/recall@N: share of prompts with an answering block among the N best.
    KIND/wished, KIND/hit: blocks wished for of a prompt; share of prompts
      with an answering one among these.
    KIND/answers: area under the curve of telling what the history answers.
    KIND/saved: of text that is read on, what the blocks wished for are worth,
      those that cost more than they save deducted, as a share of what all that
      save are worth; KIND/wished counts them, of those measured.
  """
  found: dict[str, float] = {}
  for kind, some in windows.items():
    rows, out, shadow = outputs(params[part_of(kind)], lens, embed, some)
    mask, asked = some.block[rows] >= 0, some.asked[rows]
    gold = (some.gold[rows] > 0) & mask
    less = shadow @ np.asarray(params["apart"])
    score = np.tanh(out.worth - less * asked[:, None])
    known = asked & gold.any(axis=1)
    wished = (score > WISH) & mask
    if known.any():
      for count in _COUNTS:
        found[f"{kind}/recall@{count}"] = lens_losses.recall(
          np.asarray(out.rank - less)[known], gold[known], count)
      found[f"{kind}/wished"] = float(wished[known].sum(1).mean())
      found[f"{kind}/hit"] = float((wished & gold)[known].any(1).mean())
      yes = out.answerable[asked & some.answerable[rows]]
      no = out.answerable[asked & ~some.answerable[rows]]
      if len(yes) and len(no):
        found[f"{kind}/answers"] = float((yes[:, None] > no).mean())
    if not asked.all():
      worth = np.nan_to_num(some.worth[rows][~asked].astype(np.float32))
      measured = wished[~asked] & (worth != 0)
      found[f"{kind}/saved"] = float(
        (worth * measured).sum() / max(np.maximum(worth, 0).sum(), 1e-6))
      found[f"{kind}/wished"] = float(measured.sum(1).mean())
  return found
