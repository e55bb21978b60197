"""Sweeps: grids, killed runs, failed cells, shards, the table."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mcjax.sweep import cell as one
from mcjax.sweep import grid, runner, table
from mcjax.types import McjaxError

_ROOT = pathlib.Path(__file__).parents[2]
# An experiment as far as a sweep is concerned: it takes --config.x and --y,
# leaves results, and notes every run of its own.
_TARGET = """
import json, pathlib, sys, time
given = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(given["workdir"])
with open(folder.parent.parent / "began.txt", "a") as log:
  log.write(folder.name + "\\n")
time.sleep(float(given["pause"]))
x, y = float(given["config.x"]), given["config.y"]
if y == "bad":
  sys.exit("error: bad is no y")
(folder / "results.json").write_text(json.dumps(
  {"figures": {"square": {"value": x * x, "unit": ""}}}))
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
  """Makes the experiment importable for the processes of a sweep."""
  (tmp_path / "code").mkdir()
  (tmp_path / "code/target_of_sweep.py").write_text(_TARGET)
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'code'}:{_ROOT}")
  return tmp_path / "work"


def _experiment(workdir, pause=0.0, **settings):
  return runner.Experiment(
    "target_of_sweep", [f"--pause={pause}"], settings, workdir)


def _began(workdir) -> list[str]:
  return (workdir / "began.txt").read_text().split()


def test_a_grid_is_every_combination():
  cells = grid.cells(["window=512,1024", "steps=(1,2),(3,)", "p='a,b'"])
  assert [c.values for c in cells] == [
    {"window": w, "steps": s, "p": "'a,b'"}
    for w in ("512", "1024") for s in ("(1,2)", "(3,)")]
  assert cells[0].overrides[1] == "--config.steps=(1,2)"
  assert len({c.name for c in cells}) == 4
  assert grid.cells(["a=/x/y"])[0].name != grid.cells(["a=_x_y"])[0].name
  assert [c.values for c in grid.cells([])] == [{}]


@pytest.mark.parametrize("axes", [["a"], ["a="], ["=1"], ["a=1", "a=2"]])
def test_a_wrong_axis_is_named(axes):
  with pytest.raises(McjaxError, match=f"--grid={axes[-1]}: "):
    grid.cells(axes)


def test_shards_part_the_cells():
  cells = grid.cells(["a=1,2,3,4,5,6,7"])
  parts = [grid.shard(cells, f"{i}/3") for i in range(3)]
  assert sorted(c.name for p in parts for c in p) == [c.name for c in cells]
  for wrong in ("3/3", "1", "a/2", "-1/2"):
    with pytest.raises(McjaxError, match="--shard"):
      grid.shard(cells, wrong)


def test_a_killed_sweep_goes_on_and_repeats_nothing(target):
  """Twelve cells; the whole process group is killed twice while it works."""
  code = (
    "import pathlib, sys\n"
    "from mcjax.sweep import grid, runner\n"
    "cells = grid.cells(['x=1,2,3,4,5,6', 'y=a,b'])\n"
    "runner.run(runner.Experiment('target_of_sweep', ['--pause=0.4'], {},\n"
    "           pathlib.Path(sys.argv[1])), cells, 3)\n")
  finished, kills = set(), []
  for least in (3, 7):
    process = subprocess.Popen(
      [sys.executable, "-c", code, str(target)], start_new_session=True,
      stderr=subprocess.DEVNULL)
    until = time.time() + 60
    while len(list(target.glob("cells/*/done.json"))) < least:
      assert time.time() < until and process.poll() is None
      time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    now = {p.parent.name for p in target.glob("cells/*/done.json")}
    assert finished < now and len(now) < 12
    finished = now
    kills.append((now, len(_began(target))))
  before = _began(target)
  cells = grid.cells(["x=1,2,3,4,5,6", "y=a,b"])
  assert runner.run(_experiment(target, 0.4), cells, 3) == {}
  again = _began(target)[len(before) :]
  assert sorted(again) == sorted({c.name for c in cells} - finished)
  assert len(table.rows(target)) == 12
  for done, count in kills:  # what ran at a kill begins again, and only that
    assert not done & set(_began(target)[count:])


def test_an_orphan_is_waited_for_not_repeated(target):
  """The sweep alone is killed; its cells end by themselves."""
  cells = grid.cells(["x=1", "y=a"])
  experiment = _experiment(target, 1.0)
  process = runner._start(experiment, cells[0])
  while not (target / "began.txt").exists():
    time.sleep(0.02)
  assert runner.run(experiment, cells) == {}
  assert process.wait() == 0 and len(_began(target)) == 1


def test_a_failed_cell_is_named_and_the_rest_done(target):
  cells = grid.cells(["x=1,2", "y=a,bad"])
  failed = runner.run(_experiment(target), cells, 2)
  assert failed == {f"x={x},y=bad": "error: bad is no y" for x in (1, 2)}
  assert [r.figures for r in table.rows(target)] == [
    {"square": 1.0}, {"square": 4.0}]
  assert "bad is no y" in (target / "cells/x=1,y=bad/log.txt").read_text()
  assert len(runner.run(_experiment(target), cells, 2)) == 2  # tried again
  assert _began(target).count("x=1,y=a") == 1
  lost = runner.run(
    _experiment(target)._replace(module="no_such_module"),
    grid.cells(["x=9"]))
  assert "No module named no_such_module" in lost["x=9"]


def test_other_settings_are_refused(target):
  cells = grid.cells(["x=1", "y=a"])
  runner.run(_experiment(target, base="one"), cells)
  runner.run(_experiment(target, base="one"), cells)
  with pytest.raises(McjaxError, match="made with base='one', not 'two'"):
    runner.run(_experiment(target, base="two"), cells)


def _leave(workdir, values, figures, seconds=1.0):
  folder = workdir / "cells" / grid.Cell(values).name
  folder.mkdir(parents=True)
  one.write(folder / one.DONE, {"values": values, "seconds": seconds})
  one.write(folder / "results.json", {
    "figures": {k: {"value": v, "unit": ""} for k, v in figures.items()}})


def test_the_table_has_every_cell(tmp_path):
  assert table.write(tmp_path) is None
  for x in ("8", "16"):
    for y in ("a", "b"):
      _leave(tmp_path, {"x": x, "y": y}, {
        "nll/a": float(x), "nll/b": 2.0, **{f"f{i}": i for i in range(9)}})
  table.write(tmp_path, ["nll/*"])
  with open(tmp_path / "results.csv", newline="") as file:
    read = list(csv.DictReader(file))
  assert len(read) == 4 and read[0]["nll/a"] == "16.0" and read[0]["f8"] == "8"
  text = (tmp_path / "results.md").read_text()
  assert "| x | y | seconds | nll/a | nll/b |" in text
  assert "9 more figures" in text
  with pytest.raises(McjaxError, match="--figures=none"):
    table.write(tmp_path, ["none*"])


def test_figures_that_differ_come_first(tmp_path):
  for x in ("8", "16"):
    _leave(tmp_path, {"x": x}, {
      **{f"f{i}": i for i in range(9)}, "last": float(x)})
  table.write(tmp_path)
  text = (tmp_path / "results.md").read_text()
  assert "| x | seconds | last | f0 | f1 |" in text and "f8" not in text


def test_training_metrics_are_read(tmp_path):
  folder = tmp_path / "cells" / "a=1"
  folder.mkdir(parents=True)
  one.write(folder / one.DONE, {"values": {"a": "1"}, "seconds": 1.0})
  (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [
    {"step": 1, "loss": 3.0, "recovered": 0.1}, {"step": 2, "loss": 2.0}])))
  assert table.rows(tmp_path)[0].figures == {
    "step": 2, "loss": 2.0, "recovered": 0.1}


def test_the_command_names_a_wrong_axis(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.sweep", f"--workdir={tmp_path}",
     "--config=evaluate/visible:quick", "--grid=windw=512"],
    cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
  assert "did you mean config.window?" in done.stderr
