"""Metrics of a run, wherever they are written."""

import json
import sys
import types

import pytest

from mcjax.training.common import speed
from mcjax.training.common.metrics import MetricWriter
from mcjax.types import McjaxError


def _steps(folder) -> list[int]:
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(row)["step"] for row in rows]


def test_rows_after_the_checkpoint_and_cut_ones_are_dropped(tmp_path):
  first = MetricWriter(tmp_path)
  for step in (1, 2, 3):
    first.write(step, {"loss": 1.0})
  first.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "lo')  # a kill in the middle of a row
  second = MetricWriter(tmp_path, resume_step=2)
  second.write(3, {"loss": 0.5})
  second.close()
  assert _steps(tmp_path) == [1, 2, 3]


def test_a_project_of_wandb_gets_every_row(tmp_path, monkeypatch):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((step, values))

    def finish(self):
      calls.append("finished")

  names = []
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
    init=lambda **kept: names.append(kept) or Run()))
  for step in (1, 2):  # a run that goes on keeps its name
    writer = MetricWriter(tmp_path, step - 1, wandb="gists")
    writer.write(step, {"loss": 2.0})
    writer.close()
  assert calls == [(1, {"loss": 2.0}), "finished",
                   (2, {"loss": 2.0}), "finished"]
  assert names[0] == names[1] and names[0]["project"] == "gists"


def test_wandb_that_is_missing_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(McjaxError, match="pip install wandb"):
    MetricWriter(tmp_path, wandb="gists")


def test_mfu_is_told_where_the_peak_is_known():
  assert "mfu" not in speed.rates(100, 1e9, 2.0)  # a CPU has no stated peak
  found = speed.rates(100, 8e12, 2.0, tflops=1.0)  # on eight host devices
  assert found == {"tokens_per_second": 50.0, "mfu": 0.5}
