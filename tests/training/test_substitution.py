"""The substitution benchmark: variants, coverage and statistics."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import gistnet
from mcjax.base import model
from mcjax.evaluation import substitution as sub
from mcjax.types import McjaxError

_SETTING = sub.Setting(blocks=3, horizon=20)


def _bench(lm, stores, setting=_SETTING):
  return sub.Bench(lm, sub.pick_excerpts(stores, setting, 2), setting)


def test_excerpts_come_from_different_documents(tiny_stores):
  excerpts = sub.pick_excerpts(tiny_stores, _SETTING, 2)
  assert excerpts.ids.shape == (4, 3 * 32 + 21)
  assert len(set(excerpts.names)) == 4
  again = sub.pick_excerpts(tiny_stores, _SETTING, 2)
  np.testing.assert_array_equal(excerpts.ids, again.ids)


def test_full_and_drop_equal_the_plain_decoder(tiny_lm, tiny_stores):
  bench = _bench(tiny_lm, tiny_stores)

  def plain(ids):
    x = model.embed(tiny_lm.params, jnp.asarray(ids))
    hidden, _, _ = model.forward(
      tiny_lm.params, tiny_lm.config, x[:-1],
      jnp.arange(len(ids) - 1, dtype=jnp.int32))
    return float(jnp.mean(model.token_nll(
      tiny_lm.params, hidden[-20:], jnp.asarray(ids[-20:]))))

  for row, ids in enumerate(bench.excerpts.ids):
    assert bench.controls["full"][row] == pytest.approx(plain(ids), abs=1e-4)
    assert bench.controls["drop"][row] == pytest.approx(
      plain(ids[96:]), abs=1e-4)


def test_untrained_gists_are_the_last_token_control(tiny_lm, tiny_stores):
  losses = _bench(tiny_lm, tiny_stores).measure(gistnet.load_gistnet(tiny_lm))
  np.testing.assert_allclose(losses["gist"], losses["last"], rtol=1e-6)
  assert np.abs(losses["shuffled"] - losses["last"]).max() > 1e-4
  assert np.abs(losses["mean"] - losses["last"]).max() > 1e-4


@pytest.mark.parametrize("change", [
  dict(near=24), dict(sink=True), dict(gist_stride=8), dict(near=8, sink=True),
  dict(level=2, blocks=1)])
def test_settings_run(tiny_lm, tiny_stores, change):
  stores = tiny_stores
  setting = dataclasses.replace(_SETTING, **change)
  if setting.level == 2:
    stores = {"code": stores["code"]}
  bench = _bench(tiny_lm, stores, setting)
  report = sub.summarise(
    bench.measure(gistnet.load_gistnet(tiny_lm)), bench.excerpts.kinds)
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
  assert report["delta_nll"] == pytest.approx(1.0, abs=0.1)
  assert report["kinds"]["a"]["documents"] == 20


def test_errors(tiny_lm, tiny_stores):
  with pytest.raises(McjaxError, match="horizon"):
    sub.Setting(horizon=0)
  with pytest.raises(McjaxError, match="no document"):
    sub.pick_excerpts(tiny_stores, sub.Setting(blocks=200), 1)
  excerpts = sub.pick_excerpts(tiny_stores, _SETTING, 1)
  with pytest.raises(McjaxError, match="excerpts hold"):
    sub.Bench(tiny_lm, excerpts, dataclasses.replace(_SETTING, horizon=9))
