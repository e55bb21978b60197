"""The llama.cpp baseline: the same model, and clear errors without it."""

import sys
import types

import numpy as np
import pytest

from mcjax.base import load, model
from mcjax.evaluation.systems.llama_cpp import LlamaCpp
from mcjax.types import McjaxError


def test_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "llama_cpp", None)
  with pytest.raises(McjaxError, match=r"pip install 'mcjax\[llama\]'"):
    LlamaCpp("smollm2-135m", 64)


def test_a_folder_is_refused(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "llama_cpp", types.ModuleType("llama_cpp"))
  with pytest.raises(McjaxError, match="GGUF"):
    LlamaCpp(str(tmp_path), 64)


@pytest.mark.network
def test_it_is_the_same_model():
  pytest.importorskip("llama_cpp")
  lm = load.load_base_lm("smollm2-135m")
  ids = lm.tokenizer.encode("The ferry leaves the harbour at seven and")
  llama = LlamaCpp("smollm2-135m", 128)
  ours = np.asarray(model.logits(lm.params, lm.config, ids))[-1]
  theirs = llama.prefill(ids)
  assert np.argmax(theirs) == np.argmax(ours)
  assert np.corrcoef(theirs, ours)[0, 1] > 0.99
  assert llama.decode(3) > 0
  np.testing.assert_array_equal(llama._llama.n_tokens, len(ids))
  np.testing.assert_allclose(llama.prefill(ids), theirs, atol=1e-5)
