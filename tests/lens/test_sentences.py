"""Which sentences answer: their features, the network, how it reads."""

from lens_cases import asked_view, opened
import numpy as np
import pytest

from mcjax.lens import network as lensnet
from mcjax.lens import sentence_net, weights
from mcjax.lens.sentence_features import (
  FEATURES,
  NAMES,
  candidates,
  sentence_features,
)
from mcjax.testing import tiny_base
from mcjax.types import McjaxError

TEXT = ("The mill stood by the river. The miller kept a cat named Ada. "
        "She slept on flour.\nNobody came in winter. ")


@pytest.fixture
def asked(tiny_lm, tiny_gistnet):
  """A policy that was asked for a sentence far back, and its candidates."""
  mc = opened(tiny_lm, tiny_gistnet, 3000)
  mc.ingest(TEXT, name="mill")
  mc.ingest(tiny_base.text(3000, 5))
  policy = mc._loop._policy
  policy.score(asked_view(mc, "what is the cat of the miller named?"))
  start = mc.documents()[1].start
  evidence = [(b, 0.9 - 0.1 * i) for i, b in enumerate(
    range(start // 32, start // 32 + 4))]
  spans, strength = candidates(policy._reader, evidence, policy._stop)
  yield mc, policy, spans, strength
  mc.close()


def features(policy, spans, strength):
  return sentence_features(policy._matcher, policy._query, spans, strength)


def test_the_sentence_that_holds_the_words_stands_out(asked):
  mc, policy, spans, strength = asked
  assert spans == sorted(set(spans)) and len(spans) == len(strength)
  values = features(policy, spans, strength)
  assert values.shape == (len(spans), FEATURES) and np.isfinite(values).all()
  named = dict(zip(NAMES, values.T))
  best = int(np.argmax(named["share"]))
  assert "named Ada" in mc.text(*spans[best])
  assert named["rank_share"][best] == 1.0 and named["gap_share"][best] == 0.0
  assert "She slept" in mc.text(*spans[best + 1])
  assert named["behind_first"][best + 1] == 1.0
  assert named["exact_before"][best + 1] == named["exact_own"][best]
  assert named["exact_near"][best + 1] >= named["exact_own"][best + 1]


def test_sentences_apart_are_no_neighbours(asked):
  _, policy, spans, strength = asked
  apart = [spans[0], spans[2]]
  values = features(policy, apart, strength[[0, 2]])
  named = dict(zip(NAMES, values.T))
  assert not named["exact_before"].any() and not named["exact_after"].any()


def test_weights_that_know_better_choose_what_is_read(asked):
  mc, policy, spans, strength = asked
  evidence = [(a // 32, 0.9) for a, _ in spans[:4]]
  params = sentence_net.init_params()
  linear = np.zeros_like(params["linear"]["kernel"])
  linear[NAMES.index("behind_first")] = 9.0
  params = params | {"linear": {"kernel": linear}, "out": {
    "kernel": np.zeros_like(params["out"]["kernel"])}}
  policy._read, policy._read_share = params, 0.5
  (span,) = policy._choose(evidence)
  assert mc.text(*span).strip() == "She slept on flour."


def test_weights_for_other_features_are_refused_by_name(tiny_lm, tmp_path):
  config = lensnet.LensNetConfig(d_model=tiny_lm.config.d_model)
  params = lensnet.init_params(config)
  part = sentence_net.init_params()
  path = tmp_path / "l.safetensors"
  weights.save_lensnet(path, {**params, "read": part}, config, {"steps": 1})
  assert "read" in weights.read_weights(tiny_lm, path)[0]
  part["linear"]["kernel"] = np.zeros((3, 1), np.float32)
  weights.save_lensnet(path, {**params, "read": part}, config, {"steps": 1})
  with pytest.raises(McjaxError, match="l.safetensors.*train_reader"):
    weights.read_weights(tiny_lm, path)
