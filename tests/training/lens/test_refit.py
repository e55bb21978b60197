"""Fitting LensNet's projections to another GistNet."""

import jax
import numpy as np

from mcjax.gist import encoder as gistnet
from mcjax.lens import network as lensnet
from mcjax.training.lens import refit as lens_refit

_LENS = lensnet.LensNetConfig(
  d_model=32, width=16, heads=2, layers=1, feature_width=8, key_dim=16)


class _Turned(gistnet.GistEncoder):
  """Writes another GistNet's gists in a turned space, so that a fit exists."""

  turn = np.linalg.qr(np.random.default_rng(3).normal(size=(32, 32)))[0]

  def encode_tokens(self, token_ids):
    return (super().encode_tokens(token_ids) @ self.turn).astype(np.float32)

  def encode_gists(self, gists, level):
    below = (gists @ self.turn.T).astype(np.float32)
    return (super().encode_gists(below, level) @ self.turn).astype(np.float32)


def test_finds_the_turn_and_leaves_the_rest(tiny_lm, tiny_gist_config):
  params = gistnet.init_params(tiny_gist_config)
  old, new = (kind(tiny_lm, params, tiny_gist_config, True)
              for kind in (gistnet.GistEncoder, _Turned))
  score = jax.device_get(lensnet.init_params(_LENS)["score"])
  ids = np.random.default_rng(0).integers(0, 64, (6, 1024)).astype(np.int32)
  found, missed = lens_refit.refit(
    score, old, new, np.asarray(tiny_lm.params["embed"]), ids)
  assert missed["project_gists"] < 1e-4
  kernel = score["project_gists"]["kernel"]
  fitted = found["project_gists"]["kernel"]
  assert np.abs(kernel - fitted).max() > 0.1
  gists = old.encode_tokens(ids[:, :32])
  np.testing.assert_allclose(
    gists @ new.turn @ fitted, gists @ kernel, atol=0.02)
  # Raw tokens are not turned, so one projection cannot serve both.
  assert missed["project_tail"] > 0.01
  for name in score:
    if name not in ("project_gists", "project_tail"):
      jax.tree.map(np.testing.assert_array_equal, score[name], found[name])
