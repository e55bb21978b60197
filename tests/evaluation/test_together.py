"""All suites in one folder: one report, resumed, failures named."""

import dataclasses
import json
import pathlib

from browser import needs_browser, opened
import numpy as np
import pytest

import experiments
from mcjax import settings
from mcjax.cli import configs
from mcjax.evaluation import runner, together
from mcjax.evaluation.suites import substitution, visible
from mcjax.evaluation.systems import models
from mcjax.training.common import data
from mcjax.types import McjaxError

_FOLDER = pathlib.Path(experiments.__file__).parent / "configs"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm):
  """The folder of a run in which one of two suites fails, and its error."""
  folder = tmp_path_factory.mktemp("all")
  rng = np.random.default_rng(1)
  data.write_kind(folder / "store", "heldout", "prose", [
    (f"p{i}", rng.integers(97, 123, 1200)) for i in range(2)], 300)
  suites = {
    "substitution": dataclasses.asdict(
      substitution.Settings.quick(data=str(folder / "nowhere"))),
    "visible": dataclasses.asdict(visible.Settings.quick(
      data=str(folder / "store"), history=512))}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(models, "load_base_lm", lambda *a, **k: tiny_lm)
    with pytest.raises(McjaxError) as error:
      together.run(suites, folder / "out")
  return folder / "out", suites, str(error.value)


def test_a_failed_suite_is_named_and_the_rest_reported(run):
  folder, _, error = run
  assert error.startswith("failed: substitution: no heldout text")
  record = json.loads((folder / "results.json").read_text())
  assert "visible/all/nll/masked" in record["figures"]
  assert record["figures"]["visible/cost/cpu_seconds"]["value"] > 0
  assert "# visible" in (folder / "results.md").read_text()


def test_what_is_finished_is_not_run_again(run, monkeypatch):
  folder, suites, _ = run
  monkeypatch.setattr(runner, "run", None)
  together.run(suites, folder, ["visible"])
  with pytest.raises(McjaxError, match="did you mean config.suites.visible"):
    together.run(suites, folder, ["visibel"])
  monkeypatch.setattr(together, "environment", lambda: {"commit": "another"})
  with pytest.raises(TypeError):  # that of another commit is
    together.run(suites, folder, ["visible"])


@needs_browser
def test_a_browser_shows_all_sections(run, tmp_path):
  document, complaints = opened(run[0] / "report.html", tmp_path)
  assert not complaints and "<h1>visible</h1>" in document


def test_one_base_is_that_of_all_suites():
  c = configs.load(configs.find("evaluate/all_small", _FOLDER))
  c.base = "another"
  found = c.to_dict()["suites"]
  assert set(found) == set(runner.NAMES)
  assert {s["base"] for s in found.values()} == {"another"}


def test_the_short_sizes_are_fewer_samples_of_the_same_suites():
  sizes = {
    size: configs.load(configs.find("evaluate/all" + size, _FOLDER)).to_dict()
    for size in ("", ":short")}
  assert set(sizes[":short"]["suites"]) == set(runner.NAMES)
  for name, values in sizes[":short"]["suites"].items():
    read = settings.read_fields(runner.settings(name), "", values)
    assert read.base == "smollm2-135m"
  for name, field in (("questions", "questions"), ("needle", "samples"),
                      ("focus", "needs"), ("ceiling", "documents")):
    assert (sizes[":short"]["suites"][name][field]
            < sizes[""]["suites"][name][field])
