"""Scalar metrics of a run: JSON lines always, TensorBoard if installed."""

from __future__ import annotations

from collections.abc import Mapping
import json
import pathlib
import time


class MetricWriter:
  """Appends scalars to `metrics.jsonl` and to TensorBoard event files.

  Args:
    folder: of the run; created if missing.
    resume_step: rows of later steps, left by a run that was stopped between
      two checkpoints, are dropped.
  """

  def __init__(self, folder, resume_step: int = 0):
    self._path = pathlib.Path(folder) / "metrics.jsonl"
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists():
      rows = [line for line in self._path.read_text().splitlines()
              if json.loads(line)["step"] <= resume_step]
      self._path.write_text("".join(row + "\n" for row in rows))
    self._file = self._path.open("a")
    self._events = _event_writer(folder)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records scalars of one step."""
    values = {k: float(v) for k, v in values.items()}
    row = {"step": step, "time": round(time.time(), 3), **values}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    if self._events is not None:
      for name, value in values.items():
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes the files."""
    self._file.close()
    if self._events is not None:
      self._events.close()


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
