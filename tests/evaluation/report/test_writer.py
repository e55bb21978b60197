"""Reports: what is written, and how numbers are told."""

import json

import pytest

from mcjax.evaluation.report import charts, intervals
from mcjax.evaluation.report import writer as report
from mcjax.types import McjaxError


def test_a_report_says_what_made_it(tmp_path):
  out = report.Report("speed", {"window": 512, "lengths": (1, 2)})
  out.add("rate", 1234.5678, "tokens/s")
  out.add("missing", float("nan"), "s")
  out.tables.append(report.Table("Rates", ("arm", "tokens/s"),
                                 [["plain", 1234.5], ["loop", None]]))
  out.notes.append("A note.")
  out.write(tmp_path / "new")
  found = json.loads((tmp_path / "new" / "results.json").read_text())
  assert found["figures"]["rate"] == {"value": 1234.57, "unit": "tokens/s"}
  assert found["figures"]["missing"]["value"] is None
  assert found["config"] == {"window": 512, "lengths": [1, 2]}
  assert found["versions"]["jax"] and found["device"]["kind"]
  assert found["commit"] and found["date"]
  text = (tmp_path / "new" / "results.md").read_text()
  assert "| plain | 1,234 |" in text and "| loop | – |" in text
  assert "- A note." in text and found["commit"] in text


def test_a_mean_becomes_figures_and_a_cell():
  out = report.Report("x", {})
  found = intervals.of_mean([0.0, 1.0])
  assert out.add_found("rate", found) == "0.50 [0.00, 1.00]"
  assert out.figures["rate"] == report.Figure(0.5, "share", 2, (0.0, 1.0))
  assert "rate/n" not in out.figures
  assert out.add_found("loss", found, "nats", 3, "texts") == (
    "0.500 [0.000, 1.000]")
  assert out.figures["loss/n"] == report.Figure(2, "texts")
  assert out.add_found("missing", None, counted="texts") is None
  assert not any(name.startswith("missing") for name in out.figures)


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(McjaxError, match="cannot make"):
    report.make_folder(tmp_path / "file" / "below")


def test_plots_need_matplotlib(tmp_path, monkeypatch, capsys):
  import builtins

  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith("matplotlib"):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  drawn = charts.plot_lines(tmp_path / "a.png", {"x": ([1], [2])}, "", "", "")
  assert not drawn and not (tmp_path / "a.png").exists()
  assert "matplotlib" in capsys.readouterr().err


def test_ratios_are_taken_side_by_side():
  assert report.ratio_median([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
