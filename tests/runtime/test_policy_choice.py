"""Policy choice: LensNet where trained weights fit, else what is known."""

import dataclasses

import pytest

from mcjax import Config, McjaxError, MegaContext, pretrained
from mcjax.gist import encoder as gistnet
from mcjax.lens import network as lensnet
from mcjax.lens import policy as lensnet_policy
from mcjax.lens import weights
from mcjax.runtime import policy_choice
from mcjax.testing import tiny_base

AUTO = Config(window=512)


@pytest.fixture
def shipped(tiny_lm, tiny_gistnet, tmp_path, monkeypatch):
  """Ships a LensNet for the tiny base: of a seed, with a model card."""
  path = tmp_path / "lensnet.safetensors"

  def ship(card, seed=5):
    config = lensnet.LensNetConfig(d_model=32, width=16, heads=2)
    weights.save_lensnet(
      path, lensnet.init_params(config, seed=seed), config, card)

  monkeypatch.setattr(pretrained, "shipped", lambda base, kind:
                      path if kind == "lensnet" else None)
  ship({"gistnet": tiny_gistnet.fingerprint})
  return ship


def test_auto_is_similarity_where_nothing_is_shipped(tiny_lm, tiny_gistnet):
  choice = policy_choice.choose(AUTO, tiny_lm, tiny_gistnet)
  assert choice.name == "similarity" and choice.keyer is None
  untrained = dataclasses.replace(AUTO, policy="lensnet")
  assert policy_choice.choose(
    untrained, tiny_lm, tiny_gistnet).name == "lensnet"


def test_auto_is_lensnet_where_its_weights_fit(tiny_lm, tiny_gistnet, shipped):
  choice = policy_choice.choose(AUTO, tiny_lm, tiny_gistnet)
  assert choice.name == "lensnet" and choice.keyer is choice.policy.keyer
  other = tiny_base.gistnet(tiny_lm, spread=0.2)
  choice = policy_choice.choose(AUTO, tiny_lm, other)
  assert choice.name == "similarity" and choice.keyer is not None
  given = lensnet_policy.load_lensnet(tiny_lm, gistnet=other)
  choice = policy_choice.choose(AUTO, tiny_lm, other, given)
  assert choice.policy is given and choice.name == "lensnet"
  loose = lensnet_policy.load_lensnet(tiny_lm)  # which knows no GistNet
  assert policy_choice.choose(
    AUTO, tiny_lm, other, loose).policy._encoder is other
  few = dataclasses.replace(AUTO, read_tokens=7, search_nodes=64)
  policy_choice.choose(few, tiny_lm, other, given)
  assert given._read_tokens == 7 and given._step_nodes == 64
  shipped({"gistnet": "elsewhere"})
  assert policy_choice.choose(AUTO, tiny_lm, tiny_gistnet).name == "similarity"


@pytest.mark.parametrize("policy", ["recency", "random", "similarity"])
def test_a_policy_that_is_named_is_taken(
  tiny_lm, tiny_gistnet, shipped, policy
):
  config = dataclasses.replace(AUTO, policy=policy)
  choice = policy_choice.choose(config, tiny_lm, tiny_gistnet)
  assert choice.name == policy
  assert choice.keyer is not None  # keys are written for a later change


def test_other_keys_mean_similarity_and_a_warning(
  tiny_lm, tiny_gistnet, shipped, tmp_path, caplog
):
  place = str(tmp_path / "tree")
  with MegaContext.create(place, tiny_lm, AUTO, tiny_gistnet) as mc:
    assert mc.policy == "lensnet" and mc.config.policy == "auto"
    mc.ingest(tiny_base.text(3000))
  shipped({"gistnet": tiny_gistnet.fingerprint}, seed=6)
  with MegaContext.open(place, tiny_lm, gistnet=tiny_gistnet) as mc:
    assert mc.policy == "similarity"
    mc.generate("abc", max_new_tokens=1)
  assert "tools/rekey" in caplog.text
  asked = dataclasses.replace(AUTO, policy="lensnet")
  with pytest.raises(McjaxError, match="tools/rekey"):
    MegaContext.open(place, tiny_lm, asked, tiny_gistnet)
  mc = MegaContext.open(place, tiny_lm, gistnet=tiny_gistnet)
  mc.tree.rebuild_lens_keys(lensnet_policy.load_keyer(tiny_lm))
  mc.close()
  with MegaContext.open(place, tiny_lm, gistnet=tiny_gistnet) as mc:
    assert mc.policy == "lensnet"


def test_the_default_base_is_led_by_lensnet(smollm2):
  """Another GistNet's gists would make the shipped one worse without a word."""
  encoder = gistnet.load_gistnet(smollm2)
  assert policy_choice.choose(Config(), smollm2, encoder).name == "lensnet"
