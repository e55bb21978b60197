"""LensKeyer: keys of blocks and queries, alike on host and device."""

import numpy as np

from mcjax.lens import keyer as lens_keyer
from mcjax.lens import network as lensnet
from mcjax.lens import policy as lensnet_policy
from mcjax.lens.keyer import LensKeyer


def test_tables_are_made_once_and_told_apart(tiny_lm, monkeypatch):
  made = []
  real = lens_keyer._make_tables
  monkeypatch.setattr(lens_keyer, "_TABLES", {})
  monkeypatch.setattr(
    lens_keyer, "_make_tables", lambda *args: made.append(1) or real(*args))
  config = lensnet.LensNetConfig(d_model=32, key_dim=8)
  ids = np.arange(32)[None]
  keys = [LensKeyer(lensnet.init_params(config, seed), config, tiny_lm)
          .encode_keys(ids).tolist() for seed in (0, 1, 0)]
  assert len(made) == 2 and keys[0] == keys[2] != keys[1]
  for seed in range(9):
    LensKeyer(lensnet.init_params(config, seed), config, tiny_lm)
  assert len(lens_keyer._TABLES) == lens_keyer._MOST


def test_a_query_finds_the_block_it_is_made_of(tiny_lm):
  config = lensnet.LensNetConfig(d_model=32, key_dim=32)
  keyer = LensKeyer(lensnet.init_params(config), config, tiny_lm)
  ids = np.random.RandomState(0).randint(0, 300, (70, 32)).astype(np.int32)
  keys = keyer.encode_keys(ids).astype(np.int32)
  for block in range(0, 70, 7):
    query = keyer.query(ids[block][:28], np.ones(28, np.float32))
    assert np.argmax(keys @ query) == block


def test_the_shipped_keys_tell_what_is_alike_in_meaning(smollm2):
  """Each question is nearest to its own statement; they share no such word."""
  policy = lensnet_policy.load_lensnet(smollm2)
  assert policy.by_meaning
  pairs = (("The physician told him to stop smoking.",
            "Which habit did the doctor say the patient must quit?"),
           ("Our neighbours bought a red convertible.",
            "What car do the people next door own?"),
           ("Rain ruined most of the wheat that summer.",
            "What spoiled the harvest on the farm?"),
           ("The plane was delayed by thick fog.",
            "Why did the flight depart late from the airport?"))
  encode = smollm2.tokenizer.encode
  asked = [encode(question) for _, question in pairs]
  keys = np.concatenate([
    policy.keyer.encode_keys(encode(said)[None]) for said, _ in pairs])
  found = [np.argmax(keys.astype(np.int32) @ policy.keyer.query(
    ids, np.ones(len(ids), np.float32))) for ids in asked]
  assert found == [0, 1, 2, 3]
