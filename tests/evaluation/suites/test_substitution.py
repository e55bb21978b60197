"""Gists against their tokens: variants, coverage, statistics, the suite."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import model
from mcjax.evaluation import runner as suites
from mcjax.evaluation.report.writer import Report
from mcjax.evaluation.suites import substitution, visible
from mcjax.evaluation.systems import models
from mcjax.gist import encoder as gistnet
from mcjax.gist import weights as gist_weights
from mcjax.training.common import data
from mcjax.training.gist import recovery as sub
from mcjax.types import McjaxError

_SETTING = sub.Setting(blocks=3, horizon=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  """A folder with two kinds of random held-out documents."""
  folder = tmp_path_factory.mktemp("store")
  rng = np.random.default_rng(1)
  for kind, lengths in (("prose", (1300, 1400, 1500)), ("code", (1200, 1300))):
    data.write_kind(folder, "heldout", kind, [
      (f"{kind}-{i}", rng.integers(0, 256, n))
      for i, n in enumerate(lengths)], 300)
  return folder


@pytest.fixture(scope="module")
def stores(store):
  return data.open_split(store, "heldout")


def _bench(lm, stores, setting=_SETTING):
  return sub.Bench(lm, sub.pick_excerpts(stores, setting.length, 2), setting)


def test_excerpts_come_from_different_documents(stores):
  excerpts = sub.pick_excerpts(stores, _SETTING.length, 2)
  assert excerpts.ids.shape == (4, 3 * 32 + 21)
  assert len(set(excerpts.names)) == 4
  again = sub.pick_excerpts(stores, _SETTING.length, 2)
  np.testing.assert_array_equal(excerpts.ids, again.ids)


def test_full_and_drop_equal_the_plain_decoder(tiny_lm, stores):
  bench = _bench(tiny_lm, stores)

  def plain(ids):
    x = model.embed(tiny_lm.params, jnp.asarray(ids))
    hidden, _, _ = model.forward(
      tiny_lm.params, tiny_lm.config, x[:-1],
      jnp.arange(len(ids) - 1, dtype=jnp.int32))
    return float(jnp.mean(model.token_nll(
      tiny_lm.params, hidden[-20:], jnp.asarray(ids[-20:]))))

  means = sub.over_horizon(bench.controls)
  for row, ids in enumerate(bench.excerpts.ids):
    assert means["full"][row] == pytest.approx(plain(ids), abs=1e-4)
    assert means["drop"][row] == pytest.approx(plain(ids[96:]), abs=1e-4)


def test_the_cost_of_a_variant_is_what_it_runs_on():
  setting = sub.Setting(blocks=3, near=8, sink=True, horizon=20)
  assert setting.forwarded("full") == 32 + 96 + 8 + 20
  assert setting.forwarded("drop") == 32 + 8 + 20
  for variant in ("mean", "last", "shuffled", "gist"):
    assert setting.forwarded(variant) == 32 + 3 + 8 + 20


def test_untrained_gists_are_the_last_token_control(tiny_lm, stores):
  losses = _bench(tiny_lm, stores).measure(gistnet.load_gistnet(tiny_lm))
  np.testing.assert_allclose(losses["gist"], losses["last"], rtol=1e-6)
  assert np.abs(losses["shuffled"] - losses["last"]).max() > 1e-4
  assert np.abs(losses["mean"] - losses["last"]).max() > 1e-4


@pytest.mark.parametrize("change", [
  dict(near=8, sink=True, gist_stride=8), dict(level=2, blocks=1)])
@pytest.mark.slow
def test_settings_run(tiny_lm, stores, change):
  setting = dataclasses.replace(_SETTING, **change)
  bench = _bench(tiny_lm, stores, setting)
  report = sub.summarise(
    sub.over_horizon(bench.measure(gistnet.load_gistnet(tiny_lm))),
    bench.excerpts.kinds)
  assert np.isfinite(list(report["nll"].values())).all()


def test_recovered_is_one_for_full_and_zero_for_drop():
  losses = {"full": np.array([1.0, 2.0]), "drop": np.array([3.0, 5.0]),
            "gist": np.array([1.0, 2.0])}
  assert sub.recovered(losses) == 1.0
  assert sub.recovered(losses | {"gist": losses["drop"]}) == 0.0
  half = losses | {"gist": (losses["full"] + losses["drop"]) / 2}
  assert sub.recovered(half) == 0.5


def test_summary_has_intervals_and_kinds():
  rng = np.random.default_rng(0)
  full = rng.normal(2, 0.1, 40)
  losses = {"full": full, "drop": full + 2, "gist": full + 1 + rng.normal(
    0, 0.1, 40), "last": full + 1.5, "mean": full + 4, "shuffled": full + 2}
  report = sub.summarise(losses, ("a",) * 20 + ("b",) * 20)
  gist = report["recovered"]["gist"]
  assert gist["low"] < 0.5 < gist["high"] and gist["low"] > 0.4
  assert report["delta"]["value"] == pytest.approx(1.0, abs=0.1)
  assert report["kinds"]["a"]["documents"] == 20


def test_one_document_has_no_interval_and_no_other_text(tiny_lm, stores):
  excerpts = sub.pick_excerpts(
    {"code": stores["code"]}, _SETTING.length, per_kind=1)
  losses = sub.Bench(tiny_lm, excerpts, _SETTING).measure(
    gistnet.load_gistnet(tiny_lm))
  report = Report("substitution", {})
  substitution._compare(report, "L1", losses, excerpts.kinds, (16,), _SETTING)
  rows = {row[0]: row[1] for row in report.tables[0].rows}
  assert rows["shuffled"] == "not measured: needs two documents"
  figure = report.figures["L1/H=16/recovered/gist"].record()
  assert figure["n"] == 1 and "interval" not in figure
  assert f"{figure['value']:.3f} (n=1)" in rows["gist"]
  assert "L1/H=16/recovered/gist/low" not in report.figures


def test_errors(tiny_lm, stores):
  with pytest.raises(McjaxError, match="horizon"):
    sub.Setting(horizon=0)
  with pytest.raises(McjaxError, match="no document"):
    sub.pick_excerpts(stores, 9000, 1)
  excerpts = sub.pick_excerpts(stores, _SETTING.length, 1)
  with pytest.raises(McjaxError, match="excerpts hold"):
    sub.Bench(tiny_lm, excerpts, dataclasses.replace(_SETTING, horizon=9))


def test_horizons_are_prefixes():
  means = sub.over_horizon({"gist": np.array([[1.0, 2.0, 6.0]])}, 2)
  assert means["gist"].tolist() == [1.5]


def test_cached_controls_are_the_same_and_not_measured_again(
    tiny_lm, stores, tmp_path, monkeypatch):
  excerpts = sub.pick_excerpts(stores, _SETTING.length, 1)
  first = sub.Bench(tiny_lm, excerpts, _SETTING, cache=tmp_path)
  monkeypatch.setattr(sub.Bench, "_run", None)
  again = sub.Bench(tiny_lm, excerpts, _SETTING, cache=tmp_path)
  for name, values in first.controls.items():
    np.testing.assert_array_equal(again.controls[name], values)


@pytest.mark.parametrize("slots", [2])
@pytest.mark.slow
def test_several_vectors_a_gist(tiny_lm, stores, slots):
  config = gist_weights.default_config(
    tiny_lm.params, tiny_lm.config, slots_per_gist=slots)
  encoder = gistnet.GistEncoder(
    tiny_lm, gist_weights.init_params(config), config, trained=False)
  bench = _bench(tiny_lm, stores)
  assert bench.gists(encoder).shape[1] == 3 * slots
  assert np.isfinite(bench.measure(encoder)["gist"]).all()


@pytest.mark.slow
def test_the_suite_reports_every_setting(
    tiny_lm, store, tmp_path, monkeypatch):
  monkeypatch.setattr(models, "load_base_lm", lambda *a, **k: tiny_lm)
  suites.run("substitution", dataclasses.asdict(substitution.Settings.quick(
    data=str(store), horizons=(16, 24))), tmp_path)
  figures = json.loads((tmp_path / "results.json").read_text())["figures"]
  for name in ("L1", "L1, 32 recent", "L2", "L2, 32 recent"):
    for variant in sub.VARIANTS:
      assert figures[f"{name}/H=24/nll/{variant}"]["value"] > 0
    assert {f"{name}/H=16/recovered/gist{part}" for part in (
      "", "/low", "/high", "/code", "/prose")} <= figures.keys()
  assert figures["unrelated_gists/H=16/delta_nll"]["unit"] == "nats per token"
  assert 0 < figures["flops_per_token/share"]["value"]
  table = (tmp_path / "results.md").read_text()
  assert table.index("recovered (") < table.index("## Cost")
  assert "| drop |" in table and "shuffled" in table


@pytest.mark.slow
def test_the_visible_suite_compares_both_arms(
    tiny_lm, store, tmp_path, monkeypatch):
  monkeypatch.setattr(models, "load_base_lm", lambda *a, **k: tiny_lm)
  suites.run("visible", dataclasses.asdict(
    visible.Settings.quick(data=str(store))), tmp_path)
  figures = json.loads((tmp_path / "results.json").read_text())["figures"]
  arms = [figures[f"all/nll/{arm}"]["value"] for arm in ("masked", "visible")]
  assert min(arms) > 0 and arms[0] != arms[1]
  assert figures["all/visible_minus_masked"]["value"] == pytest.approx(
    arms[1] - arms[0], abs=1e-4)
