"""The loop around a training step: records, checkpoints, evaluation, stops.

A step's metrics are fetched while the next one runs, so the device never waits
for the host. Only process 0 writes metrics and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import time
from typing import Any, Protocol

import jax
import numpy as np
import tqdm

from mcjax.parallel import processes
from mcjax.parallel.checkpoints import Checkpoints
from mcjax.training.common.metrics import MetricWriter
from mcjax.types import McjaxError


class Job(Protocol):
  """What is trained.

  Attributes:
    step: steps launched so far.
    state: pytree that checkpoints hold.
  """

  step: int
  state: Any

  def launch(self) -> Mapping[str, jax.Array]:
    """Starts the next step; its [] metrics, still being computed."""

  def rates(self, step: int, seconds: float) -> dict[str, float]:
    """Further metrics of step number `step`, which took so long."""


@dataclasses.dataclass(frozen=True)
class Cadence:
  """Steps of a run, and between its records; a project of W&B, if any."""

  steps: int
  log_every: int
  save_every: int
  evaluate_every: int
  wandb: str = ""


class _Records:
  """Writes metrics of steps that are done, on process 0."""

  def __init__(self, job: Job, cadence: Cadence, workdir):
    first = processes.is_first()
    self._job, self._cadence = job, cadence
    self._writer = MetricWriter(
      workdir, job.step, cadence.wandb) if first else None
    self._bar = tqdm.tqdm(total=cadence.steps, initial=job.step, unit="step",
                          dynamic_ncols=True, disable=not first)
    self._pending: tuple[int, Mapping] | None = None
    self._time = time.perf_counter()

  def pause(self) -> None:
    """Leaves the time since the last record out of the rates."""
    self._time = time.perf_counter()

  def add(self, step: int, metrics: Mapping) -> None:
    """Takes a step just launched; writes the one before."""
    before, self._pending = self._pending, (step, metrics)
    self._write(before)

  def finish(self) -> None:
    """Writes the last step launched."""
    before, self._pending = self._pending, None
    self._write(before)

  def _write(self, record) -> None:
    if record is None:
      return
    step, metrics = record
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    now = time.perf_counter()
    rates = self._job.rates(step, now - self._time)
    self._time = now
    self._bar.update()
    shown = [f"loss {values['loss']:.3f}",
             *(f"{v:.4g} {k}" for k, v in rates.items())]
    self._bar.set_postfix_str(", ".join(shown))
    if not np.isfinite(values["loss"]):
      raise McjaxError(f"loss is not finite at step {step}")
    if step % self._cadence.log_every == 0:
      self.write(step, values | rates)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if self._writer is not None:
      self._writer.write(step, values)

  def close(self) -> None:
    self._bar.close()
    if self._writer is not None:
      self._writer.close()


def run(job: Job, cadence: Cadence, workdir, checkpoints: Checkpoints,
        evaluate: Callable[[int], tuple[dict[str, float], str]] | None = None,
        report: Callable[[str], None] = tqdm.tqdm.write) -> bool:
  """Trains to the last step, or to a signal, and leaves a checkpoint.

  Args:
    job: what is trained.
    cadence: how far, and how often what is done.
    workdir: of the metrics.
    checkpoints: of the run; closed at the end.
    evaluate: step -> metrics and a line about them; all processes call it.
    report: receives the lines.

  Returns:
    whether the run is finished (False: stopped by a signal).

  Raises:
    McjaxError: the loss is not finite.
  """
  records = _Records(job, cadence, workdir)
  try:
    with processes.StopSignal() as stop:
      while job.step < cadence.steps and not stop.raised:
        metrics = job.launch()
        step = job.step
        records.add(step, metrics)
        last = stop.reached() or step == cadence.steps
        due = step % cadence.evaluate_every == 0 or step == cadence.steps
        judge = evaluate if due and not stop.raised else None
        if last or judge is not None:
          records.finish()
        if step % cadence.save_every == 0 or last:
          checkpoints.save(step, job.state, wait=last)
        if judge is not None:
          values, line = judge(step)
          records.write(step, values)
          if processes.is_first():
            report(f"step {step}: {line}")
          records.pause()
  finally:
    records.close()
  checkpoints.close()
  return job.step >= cadence.steps
