"""What every suite can be given, and text of another tokenizer."""

import json

import numpy as np
import pytest

from mcjax.config import Config
from mcjax.evaluation import runner
from mcjax.evaluation.systems import models
from mcjax.evaluation.systems.models import ModelSettings, TextSettings
from mcjax.gist import encoder as gistnet
from mcjax.gist import weights as gist_weights
from mcjax.testing import tiny_base
from mcjax.training.common import data
from mcjax.types import McjaxError


@pytest.fixture
def tiny(monkeypatch, tiny_lm):
  monkeypatch.setattr(models, "load_base_lm", lambda *a, **k: tiny_lm)


@pytest.mark.parametrize("name", runner.NAMES)
def test_every_suite_takes_every_model(name):
  fields = set(runner.settings(name).__dataclass_fields__)
  assert {"base", "dtype", "gistnet", "lensnet"} <= fields


def test_the_given_gistnet_writes_the_history(
    tiny, tiny_lm, tmp_path, memory_url):
  path = tmp_path / "gistnet.safetensors"
  mine = tiny_base.gistnet(tiny_lm, seed=5, spread=0.1)
  gist_weights.save_gistnet(path, mine.params, mine.config, {})
  found = ModelSettings(gistnet=str(path)).load()
  assert found.encoder.fingerprint == mine.fingerprint
  with found.create(memory_url, Config(window=512, policy="recency")) as mc:
    mc.ingest("some text " * 20)
  again = found._replace(encoder=gistnet.load_gistnet(tiny_lm))
  with pytest.raises(McjaxError, match="GistNet"):
    again.open(memory_url, Config(window=512, policy="recency"))


def test_text_of_another_tokenizer_is_refused(tiny, tiny_lm, tmp_path):
  text = tiny_lm.tokenizer.encode("plain words of a text, again. " * 9)
  for name, ids in (("same", text), ("other", np.arange(128, 300))):
    data.write_kind(tmp_path / name, "heldout", "prose", [("a", ids)], 300, 1)
    (tmp_path / name / "store.json").write_text(
      json.dumps({"base": "another", "tokenizer": "else"}))
  assert TextSettings(data=str(tmp_path / "same")).stores(tiny_lm)
  with pytest.raises(McjaxError, match="was tokenised for another, not for ti"):
    TextSettings(data=str(tmp_path / "other")).stores(tiny_lm)
