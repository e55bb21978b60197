"""Scalar metrics of a run: JSON lines always, TensorBoard if installed."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
import time

from mcjax.parallel.places import is_remote, place
from mcjax.types import McjaxError

_REWRITE = 30.0  # seconds between two writings of a file in an object store


class MetricWriter:
  """Appends scalars to `metrics.jsonl`, to TensorBoard and to W&B.

  Args:
    folder: of the run; created if missing.
    resume_step: rows of later steps, left by a run that was stopped between
      two checkpoints, are dropped.
    wandb: a project of Weights & Biases; "" for none. The run is named by its
      folder, so it goes on there too.

  Raises:
    McjaxError: wandb is asked for and not installed.
  """

  def __init__(self, folder, resume_step: int = 0, wandb: str = ""):
    self._path = place(folder) / "metrics.jsonl"
    self._path.parent.mkdir(parents=True, exist_ok=True)
    rows = self._path.read_text().splitlines() if self._path.exists() else []
    rows = [r for r in rows if _step(r) <= resume_step]
    self._rows = "".join(row + "\n" for row in rows)
    self._path.write_text(self._rows)
    self._written = time.monotonic()
    self._events = _event_writer(folder)
    self._wandb = _wandb_run(wandb, self._path) if wandb else None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records scalars of one step."""
    values = {k: float(v) for k, v in values.items()}
    row = {"step": step, "time": round(time.time(), 3), **values}
    self._append(json.dumps(row) + "\n")
    if self._events is not None:
      for name, value in values.items():
        self._events.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  def _append(self, row: str) -> None:
    """Adds a row; in an object store the file is written anew now and then."""
    if not is_remote(self._path):
      with self._path.open("a") as file:
        file.write(row)
      return
    self._rows += row
    if time.monotonic() - self._written > _REWRITE:
      self._flush()

  def _flush(self) -> None:
    self._path.write_text(self._rows)
    self._written = time.monotonic()

  def close(self) -> None:
    """Writes what is left and closes the files."""
    if is_remote(self._path):
      self._flush()
    if self._events is not None:
      self._events.close()
    if self._wandb is not None:
      self._wandb.finish()


def _step(row: str) -> float:
  """The step of a row; endless for one that a kill has cut short."""
  try:
    return json.loads(row)["step"]
  except ValueError:
    return float("inf")


class _Events:
  """Scalars as a TensorBoard event file, through tensorboard's own writer."""

  def __init__(self, folder):
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer import event_file_writer

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    self._writer = event_file_writer.EventFileWriter(str(folder))

  def add_scalar(self, name: str, value: float, step: int) -> None:
    summary = self._summary(
      value=[self._summary.Value(tag=name, simple_value=value)])
    self._writer.add_event(
      self._event(wall_time=time.time(), step=step, summary=summary))

  def close(self) -> None:
    self._writer.close()


def _event_writer(folder) -> _Events | None:
  try:
    return _Events(folder)
  except ImportError:  # TensorBoard is optional; metrics.jsonl has it all
    return None


def _wandb_run(project: str, path):
  """The run of a folder in Weights & Biases."""
  try:
    import wandb
  except ImportError as error:
    raise McjaxError("config.train.wandb needs wandb: pip install wandb"
                     ) from error
  name = str(path.parent)
  return wandb.init(
    project=project, name=name, resume="allow",
    id=hashlib.blake2b(name.encode(), digest_size=8).hexdigest())
