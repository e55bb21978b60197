"""Teaches a LensNet, on another GistNet's gists, the scores it gave on the old.

What linear projections cannot translate (`lens_refit.py`) the network learns
from its own former scores, on windows that tasks on training text reach. That
needs neither labels nor a pass of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax.config import Config
from mcjax.focus.policy import Policy
from mcjax.lens import features as lens_rows
from mcjax.lens import network as lensnet
from mcjax.lens.features import LensInputs, Rows
from mcjax.training.lens import losses as lens_losses
from mcjax.training.lens.labels import LabelConfig, Labeller
from mcjax.tree.tree import MegaContextTree
from mcjax.window.context_lm import ContextLM

_ROWS = 128  # of a window
_FAR = 3.5  # logits beyond, where the score hardly changes, count as this
_HELD = 10  # every tenth window tells how good it is


class _Onlooker(Labeller):
  """Follows tasks without running the base; keeps what LensNet would read."""

  def __init__(self, lm, old, new, config: LabelConfig):
    self._lm, self._encoder, self._config = lm, old, config
    self._new = new
    self._policy: Policy | None = None
    self._keyer = None
    self._loop_config = Config(window=config.window)
    self._context = ContextLM(lm, self._loop_config, False)
    self._others: list[MegaContextTree] = []

  def _sync(self, loop, renew: int = 1) -> None:
    del loop, renew

  def _loop(self, task, start: int, number: int):
    self._others.append(MegaContextTree.create(
      f"memory://{uuid.uuid4()}/distil",
      base_fingerprint=self._lm.fingerprint, base_name=self._lm.name,
      encoder=self._new, vocab_size=self._lm.config.vocab_size))
    return super()._loop(task, start, number)

  def _window(  # pyrefly: ignore[bad-override]
      self, loop, task, ahead, rng) -> tuple[LensInputs, LensInputs]:
    del ahead
    view, rows, _, _ = self._rows(loop, task, rng)
    keep = np.sort(rng.permutation(len(rows))[:_ROWS])
    rows = Rows(*(a[keep] for a in rows))
    tree, other = loop.tree, self._others[-1]
    other.append(tree.tokens(other.cursor, tree.cursor))
    embed = loop.context.token_embeddings
    first = lens_rows.gather(view, rows, _ROWS, embed, self._encoder)
    gists, (tail, mask) = first.gists.copy(), lens_rows.read_tail(
      other, embed, self._new)
    gists[: len(rows)] = lens_rows.block_gists(other, rows.block)
    return first, first._replace(gists=gists, tail=tail, tail_mask=mask)

  def label(self, task, number: int) -> list:
    try:
      return super().label(task, number)
    finally:
      while self._others:
        self._others.pop().close()


def observe(lm, old, new, tasks, count: int, config: LabelConfig | None = None
            ) -> Iterator[tuple[LensInputs, LensInputs]]:
  """Windows of tasks 0 to `count` as LensNet reads them with either GistNet.

  Args:
    lm: the base; only its embeddings and tokenizer are used.
    old, new: `GistEncoder`s.
    tasks: a `TaskSource`.
    count: of tasks.
    config: of the windows.

  Yields:
    inputs with old and with new gists, 128 rows each.
  """
  onlooker = _Onlooker(lm, old, new, config or LabelConfig())
  for number in range(count):
    yield from onlooker.label(tasks.task(number), number)


@functools.partial(jax.jit, static_argnames="lens")
def _logits(params, lens, tables, inputs: LensInputs) -> jax.Array:
  """Logits [B, R] of stacked inputs, clipped."""
  def one(inputs):
    found = lensnet.logits(
      params, lens, inputs, lens_losses.matches(tables, inputs))
    return jnp.clip(found, -_FAR, _FAR)

  return jax.vmap(one)(inputs)


def _stacked(inputs: Sequence[LensInputs]) -> LensInputs:
  return LensInputs(*(np.stack(a) for a in zip(*inputs)))


def distil(teacher: dict, student: dict, lens: lensnet.LensNetConfig,
           embed, windows: Sequence[tuple[LensInputs, LensInputs]],
           steps: int = 600, batch: int = 16, rate: float = 1e-3
           ) -> tuple[dict, dict[str, float]]:
  """Trains `student["score"]` on new gists to the teacher's logits on old ones.

  Args:
    teacher: parameters made for the old GistNet.
    student: parameters to start from; the keys are shared and not changed.
    lens: sizes of both.
    embed: [V, D] of the base.
    windows: what `observe` yields.
    steps, batch, rate: of AdamW, with a cosine.

  Returns:
    the student's parameters, and the share of the logits' variance that it
    missed on tenth windows that were left out, "before" and "after".
  """
  tables = lensnet.key_tables(teacher, lens, jnp.asarray(embed))
  old, new = (_stacked(side) for side in zip(*windows))
  count = len(windows)

  def rows(inputs: LensInputs, chosen) -> LensInputs:
    return LensInputs(*(a[chosen] for a in inputs))

  parts = [slice(a, a + batch) for a in range(0, count, batch)]
  wanted = np.concatenate(
    [_logits(teacher, lens, tables, rows(old, part)) for part in parts])
  held = np.arange(count) % _HELD == 0
  tx = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=0.01)

  @jax.jit
  def step(score, moments, inputs, wanted):
    def loss(score):
      found = _logits(student | {"score": score}, lens, tables, inputs)
      miss = optax.losses.huber_loss(found, wanted, delta=0.5)
      return jnp.sum(miss * inputs.mask) / jnp.sum(inputs.mask)

    with jax.numpy_dtype_promotion("standard"):
      gradient = jax.grad(loss)(score)
      updates, moments = tx.update(gradient, moments, score)
    return optax.apply_updates(score, updates), moments

  def missed(params) -> float:
    chosen = np.flatnonzero(held)
    found = np.concatenate([
      _logits(params, lens, tables, rows(new, chosen[a : a + batch]))
      for a in range(0, len(chosen), batch)])
    mask, true = new.mask[held], wanted[held]
    return float(np.mean(np.square(found - true)[mask]) / np.var(true[mask]))

  facts = {"before": missed(student)}
  score, rng = student["score"], np.random.default_rng(0)
  moments = tx.init(score)
  train = np.flatnonzero(~held)
  for _ in range(steps):
    chosen = rng.choice(train, batch, replace=len(train) < batch)
    score, moments = step(score, moments, rows(new, chosen), wanted[chosen])
  params = student | {"score": jax.device_get(score)}
  return params, facts | {"after": missed(params)}
