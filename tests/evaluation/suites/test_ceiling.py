"""Gists fitted by gradient: what they see, what they gain, the suite."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.base import model
from mcjax.evaluation import runner as suites
from mcjax.evaluation.suites import ceiling
from mcjax.evaluation.systems import models
from mcjax.gist import encoder as gistnet
from mcjax.training.common import data
from mcjax.training.gist import fitting
from mcjax.types import McjaxError

_SETTINGS = ceiling.Settings(
  blocks=2, horizons=(8,), continuations=3, continued=8, batch=2, steps=(3, 30),
  rate=0.05)


@pytest.fixture(scope="module")
def text():
  return np.random.default_rng(3).integers(0, 256, 64).astype(np.int32)


def test_samples_carry_the_states_that_the_whole_text_gives(tiny_lm, text):
  params, config = tiny_lm.params, tiny_lm.config
  tokens, hidden = fitting.sample(
    params, config, jnp.asarray(text), jax.random.key(0), 3, 8)
  assert len({tuple(row) for row in np.asarray(tokens).tolist()}) > 1
  for ids, states in zip(tokens, hidden):
    whole = jnp.concatenate([jnp.asarray(text), ids])
    expected, _, _ = model.forward(
      params, config, model.embed(params, whole),
      jnp.arange(len(whole), dtype=jnp.int32))
    np.testing.assert_allclose(states, expected[len(text) :], atol=2e-4)


def test_fitted_gists_come_nearer_to_what_the_text_says(tiny_lm, text):
  encoder = gistnet.load_gistnet(tiny_lm)
  start = encoder.encode_tokens(text.reshape(-1, 32))
  gists, kl = ceiling.fit(tiny_lm, encoder, text, start, _SETTINGS)
  assert gists.shape == (2, *start.shape) and kl.shape == (3,)
  assert kl[2] < kl[1] < kl[0]
  again, _ = ceiling.fit(tiny_lm, encoder, text, start, _SETTINGS)
  np.testing.assert_array_equal(gists, again)


def test_the_cost_counts_reading_sampling_and_steps():
  # 64 tokens read, 24 sampled; a step: 16 tokens and 2 gists, there and back.
  assert _SETTINGS.forwarded(3) == 64 + 24 + 3 * 2 * 18
  assert _SETTINGS.passes(3) == _SETTINGS.forwarded(3) / 64


@pytest.mark.parametrize("steps", [(), (0, 2), (4, 2)])
def test_steps_must_rise(steps):
  with pytest.raises(McjaxError, match="steps must be positive and rise"):
    ceiling.Settings(steps=steps)


def test_the_suite_scores_what_it_did_not_fit(
    tiny_lm, tmp_path, monkeypatch):
  rng = np.random.default_rng(1)
  for kind in ("prose", "code"):
    data.write_kind(tmp_path / "store", "heldout", kind, [
      (f"{kind}-{i}", rng.integers(0, 256, 300)) for i in range(2)], 300)
  monkeypatch.setattr(models, "load_base_lm", lambda *a, **k: tiny_lm)
  values = dataclasses.asdict(ceiling.Settings.quick(
    data=str(tmp_path / "store"), blocks=2, horizons=(8, 16), continued=8))
  suites.run("ceiling", values, tmp_path / "out")
  record = (tmp_path / "out/results.json").read_text()
  figures = json.loads(record)["figures"]
  for name in ("gist", "2 steps", "4 steps", "4 steps, shuffled"):
    assert {f"H=16/recovered/{name}{part}" for part in (
      "", "/low", "/high")} <= figures.keys()
  assert figures["kl/4 steps"]["value"] < figures["kl/gist"]["value"]
  assert "4 steps, shuffled" in (tmp_path / "out/results.md").read_text()
  monkeypatch.setattr(ceiling, "fit", None)  # kept: a second run fits nothing
  suites.run("ceiling", values, tmp_path / "out")
  assert json.loads((tmp_path / "out/results.json").read_text())[
    "figures"] == figures
