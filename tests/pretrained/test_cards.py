"""Cards: a base's settings, taken where a configuration leaves them to it."""

import json

import pytest

from mcjax import Config, McjaxError, MegaContext, pretrained
from mcjax.evaluation.systems import make
from mcjax.evaluation.systems.models import Models
from mcjax.gist import encoder
from mcjax.gist import weights as gist_weights
from mcjax.lens import network
from mcjax.pretrained import cards
from mcjax.testing import tiny_base


@pytest.fixture
def root(tmp_path, monkeypatch):
  """Ships cards from a folder of the test's own."""
  monkeypatch.setattr(cards, "_ROOT", tmp_path)
  monkeypatch.setattr(pretrained, "_ROOT", tmp_path)
  for cached in (cards.find, cards._unmeasured):
    cached.cache_clear()
  yield tmp_path
  for cached in (cards.find, cards._unmeasured):
    cached.cache_clear()


def _ship(root, base, **values):
  (root / base).mkdir(exist_ok=True)
  (root / base / "card.json").write_text(json.dumps(values))


def test_every_shipped_card_is_whole_and_says_how_it_was_chosen():
  paths = sorted(cards._ROOT.glob("*/card.json"))
  assert paths
  for path in paths:
    card = cards.find(path.parent.name)
    assert card is not None and card.chosen, path
    assert not card.nets or (cards._ROOT / card.nets).is_dir(), path


@pytest.mark.parametrize("kind, make, settings", [
  ("gistnet", gist_weights.init_params, encoder.GistNetConfig),
  ("lensnet", network.init_params, network.LensNetConfig)])
def test_shipped_weights_fit_their_configuration(kind, make, settings,
                                                 tmp_path):
  """They are not held to it at every start."""
  paths = sorted(cards._ROOT.glob(f"*/{kind}.safetensors"))
  assert paths
  for path in paths:
    params, fields, _ = pretrained.read_weights(path, kind)
    exact = kind == "gistnet"
    assert pretrained.laid_out(path, params, make, settings, fields, exact
                               ) == pretrained.laid_out(
      tmp_path / "elsewhere", params, make, settings, fields, exact)


def test_nets_that_bases_share_read_nothing_of_one_base():
  shared = {cards.find(path.parent.name).nets
            for path in cards._ROOT.glob("*/card.json")} - {""}
  assert shared
  for folder in shared:
    params, fields, card = pretrained.read_weights(
      cards._ROOT / folder / "lensnet.safetensors", "lensnet")
    assert not fields["gists"] and card["steps"] > 0
    assert params["table"]["vectors"].shape[1] == fields["key_dim"]
    assert not (cards._ROOT / folder / "gistnet.safetensors").exists()


def test_a_configuration_takes_what_it_leaves_open_from_the_card(root):
  _ship(root, "known", read_tokens=40, raw_attention="all", read_share=0.25,
        read_place="before", contrast=0.0)
  settled = cards.settled(Config(window=512), "known")
  assert (settled.read_tokens, settled.read_share, settled.contrast) == (
    40, 0.25, 0.0)
  assert settled.window == 512 and settled.read_place == "before"
  assert settled.raw_attention == "all"
  own = Config(read_tokens=7, raw_attention="blocks", read_place="turn",
               contrast=2.0)
  settled = cards.settled(own, "known")
  assert (settled.read_tokens, settled.read_share, settled.contrast) == (
    7, 0.25, 2.0)
  assert settled.read_place == "turn" and settled.raw_attention == "blocks"
  assert cards.settled(settled, "known") is settled


def test_a_kept_result_is_that_of_one_card(root, tiny_lm, tiny_gistnet,
                                          tmp_path):
  maker = make.Maker(Models(tiny_lm, tiny_gistnet), 512, tmp_path)
  _ship(root, tiny_lm.name, read_place="turn")
  before = [maker.identity(name) for name in ("megacontext", "evidence")]
  cards.find.cache_clear()
  assert [maker.identity(n) for n in ("megacontext", "evidence")] == before
  _ship(root, tiny_lm.name, read_place="before")
  cards.find.cache_clear()
  loop, plain = [maker.identity(n) for n in ("megacontext", "evidence")]
  assert loop != before[0] and plain == before[1]


def test_a_base_without_a_card_is_safe_and_told_of_once(root, caplog):
  for _ in range(2):
    settled = cards.settled(Config(), "stranger")
  assert settled.read_tokens == cards.Card().read_tokens
  assert settled.contrast == cards.Card().contrast
  told = [r.getMessage() for r in caplog.records]
  assert len(told) == 1 and "stranger" in told[0] and "\n" not in told[0]


def test_a_history_follows_the_card_at_work(root, tiny_lm, tiny_gistnet):
  _ship(root, tiny_lm.name, read_tokens=33, contrast=0.0)
  config = Config(window=512)
  with MegaContext.create(
      "memory://cards/", tiny_lm, config, tiny_gistnet) as mc:
    assert mc.config == config
    assert mc._loop._config.read_tokens == 33
    assert mc._loop._policy._read_tokens == 33
    assert mc.context._contrast is None  # no second pass is prepared
    mc.ingest(tiny_base.text(600))
    mc.generate("abc?", max_new_tokens=2)


def test_bases_of_one_tokenizer_share_their_nets(root):
  _ship(root, "small", nets="family")
  (root / "family").mkdir()
  (root / "family" / "lensnet.safetensors").touch()
  assert pretrained.shipped("small", "lensnet").parent.name == "family"
  assert pretrained.shipped("small", "gistnet") is None
  (root / "small" / "lensnet.safetensors").touch()
  assert pretrained.shipped("small", "lensnet").parent.name == "small"


@pytest.mark.parametrize("text", [
  "", "[]", "{", '{"read_tokens": 0}', '{"read_tokens": "many"}',
  '{"nets": "../elsewhere"}', '{"contrast": -1}', '{"window": 1}'])
def test_a_damaged_card_is_refused_in_one_line(root, text):
  (root / "broken").mkdir()
  (root / "broken" / "card.json").write_text(text)
  with pytest.raises(McjaxError, match="is no card") as caught:
    cards.of("broken")
  assert "\n" not in str(caught.value)
