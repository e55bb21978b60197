"""How tokens are drawn: the distribution, and what each setting leaves out."""

import jax
import numpy as np
import pytest

from mcjax.window import sampling
from mcjax.window.sampling import Sampling

_COUNT, _SIZE = 2000, 12


def _logits():
  return np.random.default_rng(3).normal(0, 0.7, _SIZE).astype(np.float32)


def _drawn(settings: Sampling) -> np.ndarray:
  """Tokens [2000], each with a key of its own."""
  rows = sampling.Rows(
    np.tile(sampling.numbers_of(settings), (_COUNT, 1)),
    jax.random.split(jax.random.key(5), _COUNT), np.zeros(_COUNT, np.int32),
    np.zeros((_COUNT, _SIZE), bool))
  return np.asarray(jax.jit(sampling.draw)(
    rows, np.tile(_logits(), (_COUNT, 1)), np.int32(0)))


def _chances(settings: Sampling) -> np.ndarray:
  """What the settings promise, written out in NumPy."""
  scaled = _logits().astype(np.float64) / settings.temperature
  chance = np.exp(scaled - scaled.max())
  chance /= chance.sum()
  order = np.argsort(-chance)
  kept = np.ones(_SIZE, bool)
  if settings.top_k:
    kept[order[settings.top_k:]] = False
  alive = np.where(kept, chance, 0)
  before = np.cumsum((alive / alive.sum())[order]) - (
    alive / alive.sum())[order]
  kept[order[before >= settings.top_p]] = False
  kept &= chance >= settings.min_p * chance.max()
  chance = np.where(kept, chance, 0)
  return chance / chance.sum()


@pytest.mark.parametrize("settings", [
  Sampling(temperature=1.0), Sampling(temperature=0.6),
  Sampling(temperature=1.3, top_k=5), Sampling(temperature=1.0, top_p=0.8),
  Sampling(temperature=1.0, min_p=0.2),
  Sampling(temperature=1.1, top_k=7, top_p=0.9, min_p=0.05)])
def test_two_thousand_samples_follow_the_softmax(settings):
  """A chi-square test at p = 0.001; what is cut is never drawn."""
  scipy = pytest.importorskip("scipy.stats")
  found = np.bincount(_drawn(settings), minlength=_SIZE)
  expected = _chances(settings) * _COUNT
  assert not found[expected == 0].any()
  often = expected >= 5
  found = np.append(found[often], found[~often].sum())
  expected = np.append(expected[often], expected[~often].sum())
  found, expected = found[expected > 0], expected[expected > 0]
  statistic = np.sum((found - expected) ** 2 / expected)
  assert statistic < scipy.chi2.isf(0.001, len(expected) - 1)
