"""Configurations: every field is there, from any folder, and errors name it."""

import dataclasses
import os
import pathlib
import subprocess
import sys

from absl import flags
import pytest

import experiments
from mcjax.base.decoder_config import DecoderConfig
from mcjax.cli import configs
from mcjax.config import Config
from mcjax.evaluation import runner
from mcjax.gist import weights as gistnet
from mcjax.gist.network import GistNetConfig
from mcjax.settings import read_fields
from mcjax.training.gist import trainer as gist_trainer
from mcjax.training.gist.losses import Objective
from mcjax.training.lens import key_distil
from mcjax.training.lens import run as lens_run
from mcjax.types import McjaxError

_FOLDER = pathlib.Path(experiments.__file__).parent / "configs"
_ROOT = _FOLDER.parent.parent


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.5
  path: str | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
  size: int
  steps: tuple[int, ...] = (1, 2)
  words: tuple[str, ...] = ()
  on: bool = True
  inner: Inner = Inner()


def _overridden(name: str, *arguments: str):
  """The configuration `name` with "a.b=value" overrides, as a main reads it."""
  from ml_collections import config_flags

  config = configs.load(configs.find(name, _FOLDER))
  changed = [configs.override(f"--config.{a}", config) for a in arguments]
  argv = ["", f"--config={configs.find(name, _FOLDER)}", *changed]
  values = flags.FlagValues()
  held = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=argv)
  values(argv)
  return held.value


def test_a_dataclass_becomes_a_config_and_back():
  c = configs.defaults(Outer(size=3))
  assert read_fields(Outer, "", c.to_dict() | {"inner": Inner()}) == Outer(3)
  with c.unlocked():
    c.inner.path = "here"  # None is a placeholder of its type
  with pytest.raises(TypeError):
    c.inner.path = 3
  assert read_fields(Inner, "inner", c.inner) == Inner(path="here")


@pytest.mark.parametrize("change, match", [
  ({"sise": 1}, r"config\.outer\.sise is not a setting; did you mean "
                r"config\.outer\.size\?"),
  ({"size": 1.5}, r"config\.outer\.size must be a whole number, got 1\.5"),
  ({"size": True}, r"config\.outer\.size must be"),
  ({"steps": (1, "x")}, r"config\.outer\.steps\[1\] must be a whole number"),
  ({"on": "yes"}, r"config\.outer\.on must be True or False"),
  ({"words": "a"}, r"config\.outer\.words must be a tuple"),
])
def test_a_wrong_value_names_its_field(change, match):
  with pytest.raises(McjaxError, match=match):
    read_fields(Outer, "outer", {"size": 1, **change})


@pytest.mark.parametrize("name", configs.names(_FOLDER))
def test_every_configuration_loads_from_any_folder(
    name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for spelling in (name, f"experiments/configs/{name}.py"):
    assert len(configs.load(configs.find(spelling, _FOLDER)))


@pytest.mark.parametrize("name, part, kind, missing", [
  ("run", "loop", Config, set()),
  ("gistnet", "train", gist_trainer.TrainConfig, {"phases"}),
  ("gistnet", "objective", Objective, set()),
  ("gistnet", "gistnet", GistNetConfig, {"d_model", "base_shape"}),
  ("gistnet_accelerator", "gistnet", GistNetConfig, {"d_model", "base_shape"}),
  ("lensnet", "windows", lens_run.LensWindows, set()),
  ("lensnet", "objective", lens_run.LensObjective, set()),
  ("lensnet", "train", lens_run.LensTrainConfig, set()),
  ("lensnet", "lens", lens_run.lensnet.LensNetConfig,
   {"d_model", "features"}),
  ("keys", "distil", key_distil.KeyConfig, set()),
])
def test_every_field_is_there(name, part, kind, missing):
  found = configs.load(configs.find(name, _FOLDER))[part]
  assert {f.name for f in dataclasses.fields(kind)} - set(found) == missing


@pytest.mark.parametrize("suite", runner.NAMES)
def test_every_field_of_a_suite_is_there(suite):
  kind = runner.settings(suite)
  for argument, expected in (("", kind()), (":quick", kind.quick())):
    c = configs.load(configs.find(f"evaluate/{suite}{argument}", _FOLDER))
    values = c.to_dict()
    assert values.pop("suite") == suite
    assert read_fields(kind, "", values) == expected


def test_overrides_reach_what_is_run():
  c = _overridden(
    "gistnet", "train.mesh_tensor=2", "train.b2=0.9", "objective.remat=layer",
    "objective.kl_segments=3", "gistnet.width=64", "phases[0].steps=7")
  train = gist_trainer.read_config(c.train, c.objective, c.phases)
  assert (train.mesh_tensor, train.b2, train.phases[0].steps) == (2, 0.9, 7)
  first = train.objective(0)
  assert (first.remat, first.kl_segments) == ("layer", 3)
  assert gistnet._given(c.gistnet) == {"width": 64}
  c = _overridden("run", "loop.telemetry_path=x", "loop.threshold=0")
  loop = read_fields(Config, "loop", c.loop)
  assert (loop.telemetry_path, loop.threshold) == ("x", 0.0)


@pytest.mark.parametrize("value", ["lensnet,recency", "('lensnet','recency')"])
def test_tuples_need_commas_only(value):
  c = _overridden("evaluate/focus", f"policies={value}", "parts=text")
  assert c.policies == ("lensnet", "recency") and c.parts == ("text",)
  c = _overridden("evaluate/overhead", "histories=512,1024", "text=a.py,b/c.py")
  assert c.histories == (512, 1024) and c.text == ("a.py", "b/c.py")


@pytest.mark.parametrize("override, match", [
  ("train.b3=1", r"config\.train\.b3 is not .* did you mean config\.train\.b2"),
  ("trian.b2=1", "did you mean config.train"),
  ("base.size=1", "config.base has no part 'size'"),
  ("phases[9].steps=1", "config.phases has no part 9"),
  ("a b=1", "not the name of a setting"),
])
def test_a_wrong_override_names_the_nearest_setting(override, match):
  config = configs.load(configs.find("gistnet", _FOLDER))
  with pytest.raises(McjaxError, match=match):
    configs.override(f"--config.{override}", config)


def test_a_wrong_file_is_told(tmp_path):
  (tmp_path / "bad.py").write_text("def get_config():\n  return 1 / 0\n")
  (tmp_path / "none.py").write_text("x = 1\n")
  with pytest.raises(McjaxError, match="bad.py: ZeroDivisionError: division"):
    configs.load(str(tmp_path / "bad.py"))
  with pytest.raises(McjaxError, match="none.py: KeyError: 'get_config'"):
    configs.load(str(tmp_path / "none.py"))
  with pytest.raises(McjaxError, match="did you mean evaluate/focus"):
    configs.find("evaluate/focs", _FOLDER)
  with pytest.raises(McjaxError, match="come with mcjax are .*evaluate/focus"):
    configs.find("zzzz", _FOLDER)
  with pytest.raises(McjaxError, match="no size 'huge' of focus"):
    configs.load(configs.find("evaluate/focus:huge", _FOLDER))
  with pytest.raises(McjaxError, match=r"config\.suite\.speed is not"):
    runner.run("speed", {}, tmp_path)


def _main(folder, *arguments):
  done = subprocess.run(
    [sys.executable, "-m", *arguments], cwd=folder, capture_output=True,
    text=True, env={**os.environ, "PYTHONPATH": str(_ROOT)})
  return done.returncode, done.stdout, done.stderr


def test_mains_are_short():
  for path in _FOLDER.parent.glob("*.py"):
    assert len(path.read_text().splitlines()) <= 60, path


@pytest.mark.parametrize("name", ["evaluate", "run", "train_gistnet"])
def test_help_ends_well_in_any_folder(name, tmp_path):
  status, out, _ = _main(tmp_path, f"experiments.{name}", "--help")
  assert status == 0 and "--profile" in out and "--config" in out


@pytest.mark.parametrize("argument, says", [
  ("stray", "error: unknown argument: stray"),
  ("--nothing=1", "error: Unknown command line flag 'nothing'"),
  ("--flagfile=/nowhere/flags", "Unable to open flagfile"),
  ("--config.loop.windows=1", "did you mean config.loop.window?"),
  ("--config.loop.window=abc",
   "config.loop.window must be a whole number, got 'abc'"),
  ("--config.loop.check_invariants=abc", "must be True or False, got 'abc'"),
])
def test_a_mistake_is_one_line(argument, says, tmp_path):
  status, _, err = _main(tmp_path, "experiments.run", argument)
  assert status == 1 and says in err and len(err.splitlines()) == 1


def test_a_decoder_is_no_configuration():
  """Fields without a default become placeholders too."""
  c = configs.defaults(DecoderConfig)
  assert c.d_model is None and c.get_type("d_model") is int
