"""The perplexity suite, and the windows that stand still."""

import numpy as np
import pytest
from untimed import untimed

from mcjax.evaluation.suites import perplexity
from mcjax.evaluation.systems import static_window
from mcjax.evaluation.systems.models import Models
from mcjax.testing import tiny_base
from mcjax.training.gist import recovery
from mcjax.types import McjaxError

SETTINGS = perplexity.Settings.quick(
  windows=(128,), fitted_windows=(128,), systems=("sink", "none"),
  history=600, steps=3)


@pytest.fixture(scope="module")
def models(tiny_lm, tiny_gistnet):
  return Models(tiny_lm, tiny_gistnet)


@pytest.fixture(scope="module")
def ids():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, SETTINGS.length).astype(np.int32)


def test_a_window_is_cut_where_it_says(ids):
  parts = static_window.cut(ids, 128, 16, 32)
  assert len(parts.sink) + 16 + len(parts.near) == 128
  whole = np.concatenate([parts.far, parts.near, parts.ahead])
  np.testing.assert_array_equal(whole, ids[-len(whole) :])
  assert len(parts.far) == 16 * 32 and len(parts.ahead) == 32
  assert static_window.needed(128, 16) == len(whole) - 32 + 32
  assert static_window.forwarded(128, 16, 32) == (
    len(parts.sink) + 16 + len(parts.near) + len(parts.ahead))
  read = len(parts.sink) + len(parts.far) + len(parts.near)
  assert static_window.forwarded(128, 16, 32, steps=3) == (
    128 + 32 + read + 3 * 2 * 128)


def test_raw_losses_are_a_plain_forward(models, ids):
  parts = static_window.cut(ids, 128, 0, 32)
  text = np.concatenate([parts.sink, parts.near, parts.ahead])
  expected = tiny_base.plain_nll(models.lm, text)[-32:]
  np.testing.assert_allclose(
    static_window.nll(models.lm, parts), expected, atol=2e-4)


def test_gists_are_seen_where_they_stand(models, ids):
  parts = static_window.cut(ids, 128, 16, 32)
  gists = static_window.written(models.encoder, parts)
  table = np.asarray(models.lm.params["embed"])
  raw = np.concatenate([parts.near, parts.ahead])
  x = np.concatenate([table[parts.sink], gists, table[raw]])
  logits = tiny_base.plain_logits(models.lm, x, np.arange(len(x)))
  rows = np.arange(len(x) - 33, len(x) - 1)
  expected = -tiny_base.log_softmax(logits)[rows, parts.ahead]
  np.testing.assert_allclose(
    static_window.nll(models.lm, parts, gists), expected, atol=2e-4)


def test_fitted_gists_read_nearer_to_the_text(models, ids):
  parts = static_window.cut(ids, 128, 16, 32)
  gists = static_window.written(models.encoder, parts)
  found = static_window.fitted(
    models.lm, models.lm, parts, gists, steps=12, rate=0.05)
  text = np.concatenate([parts.sink, parts.far, parts.near])
  table = np.asarray(models.lm.params["embed"])
  count = len(parts.near)
  teacher = tiny_base.log_softmax(tiny_base.plain_logits(
    models.lm, table[text], np.arange(len(text))))[-count:]

  def divergence(gists):
    x = np.concatenate([table[parts.sink], gists, table[parts.near]])
    student = tiny_base.log_softmax(tiny_base.plain_logits(
      models.lm, x, np.arange(len(x))))[-count:]
    return np.mean(np.sum(np.exp(teacher) * (teacher - student), -1))

  assert divergence(found) < divergence(gists)


def test_the_report_says_where_gists_pay(models, tmp_path):
  rng = np.random.default_rng(1)
  texts = rng.integers(0, 256, (3, SETTINGS.length)).astype(np.int32)
  excerpts = recovery.Excerpts(texts, ("code", "code", "prose"), ("a",) * 3)
  report = perplexity.measure(models, excerpts, SETTINGS, tmp_path)
  report.write(tmp_path)
  figures = {k: v.value for k, v in report.figures.items()}
  for name in ("128/raw", "128/masked/16", "128/visible/16", "128/fitted/16",
               "128/visible/16/minus/raw/high"):
    assert f"frontier/{name}" in figures
  assert figures["frontier/128/raw/n"] == 3
  assert figures["frontier/128/visible/16/forwarded"] == 128 + 32
  assert figures["frontier/128/fitted/16/forwarded"] > 3 * 2 * 128
  assert figures["systems/sink/nll/n"] == 3
  assert figures["systems/none/nll/minus/sink"] == pytest.approx(
    figures["systems/none/nll"] - figures["systems/sink/nll"], abs=1e-5)
  assert "pays for its slot" in (tmp_path / "results.md").read_text()
  again = perplexity.measure(models, excerpts, SETTINGS, tmp_path)
  assert {k: v.value for k, v in again.figures.items()} == figures
  anew = perplexity.measure(models, excerpts, SETTINGS, tmp_path / "anew")
  assert untimed(anew) == untimed(report)


def test_mistakes_are_told():
  with pytest.raises(McjaxError, match="gists"):
    perplexity.Settings(windows=(256,), gists=(200,))
  with pytest.raises(McjaxError, match="windows"):
    perplexity.Settings(windows=(64,))
  with pytest.raises(McjaxError, match="multiple"):
    perplexity.Settings(scored=100)
