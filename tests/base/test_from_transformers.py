"""Bases that transformers holds: the same logits, ids and turns."""

import io
import json
import pathlib
import types

import numpy as np
import pytest
import sentencepiece

import mcjax
from mcjax.base import from_transformers as module
from mcjax.base import model
from mcjax.base.load import load_base_lm
from mcjax.base.tokenizer import Tokenizer
from mcjax.testing import tiny_models
from mcjax.types import McjaxError

transformers = pytest.importorskip("transformers")
_LINES = pathlib.Path(__file__).parent / "goldens/text.txt"
_TEXT = "Ünïcode, 3 blanks:   and\n<|im_end|> as text — 漢字 🙂"
pytestmark = pytest.mark.filterwarnings("default")


def _reference(case):
  """A random model of a family as transformers has it, in memory."""
  torch = pytest.importorskip("torch")
  torch.manual_seed(3)
  settings = dict(tiny_models.CONFIGS[case])
  config = transformers.AutoConfig.for_model(
    settings.pop("model_type"), **settings)
  config.initializer_range = 0.2
  return transformers.AutoModelForCausalLM.from_config(
    config, attn_implementation="eager").eval()


def _fast():
  """The tiny byte tokenizer as a tokenizer of transformers."""
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tiny_models.byte_tokenizer(), eos_token="<|im_end|>",
    chat_template=tiny_models.CHATML)


@pytest.mark.parametrize("case", tiny_models.CONFIGS)
def test_a_model_in_memory_gives_the_same_logits(case):
  torch = pytest.importorskip("torch")

  reference = _reference(case)
  lm = mcjax.from_transformers(reference, _fast())
  ids = tiny_models.token_ids()
  with torch.no_grad():
    want = reference(torch.tensor(ids)[None].long()).logits[0].numpy()
  got = np.asarray(model.logits(lm.params, lm.config, ids))
  assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_it_is_the_base_that_its_folder_is(tmp_path):
  reference = _reference("qwen3")
  reference.save_pretrained(tmp_path)
  _fast().save_pretrained(tmp_path)
  lm, folder = mcjax.from_transformers(reference, _fast()), load_base_lm(
    tmp_path)
  assert lm.fingerprint == folder.fingerprint
  assert lm.tokenizer.stop_ids == folder.tokenizer.stop_ids
  assert lm.name == "qwen3" and mcjax.from_transformers(
    reference, _fast(), name="mine").name == "mine"


def test_quantised_weights_are_refused():
  torch = pytest.importorskip("torch")

  reference = _reference("qwen2")
  reference.register_buffer("scale", torch.zeros(2, dtype=torch.int8))
  with pytest.raises(McjaxError, match="scale.*unquantised"):
    mcjax.from_transformers(reference, _fast())


def test_only_the_librarys_own_classes_are_taken():
  class LlamaForCausalLM:
    """Of remote code, say."""

  with pytest.raises(McjaxError, match="not one of transformers' own"):
    mcjax.from_transformers(LlamaForCausalLM(), _fast())
  with pytest.raises(McjaxError, match="the tokenizer is a .*SimpleNamespace"):
    module.wrapped(types.SimpleNamespace())


def test_a_tokenizer_in_memory_is_the_one_of_its_folder(tmp_path):
  _fast().save_pretrained(tmp_path)
  assert (tmp_path / "tokenizer.json").exists()
  got, want = module.wrapped(_fast()), Tokenizer.from_folder(tmp_path)
  assert got.vocabulary_digest() == want.vocabulary_digest()
  assert got.stop_ids == want.stop_ids and got.bos_id == want.bos_id
  np.testing.assert_array_equal(got.encode(_TEXT), want.encode(_TEXT))
  said = [{"role": "user", "content": "Who?"}]
  np.testing.assert_array_equal(got.chat(said).ids, want.chat(said).ids)


def _older(folder, vocab, merges):
  """The files of a byte-level tokenizer before tokenizer.json."""
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
  (folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>",
    "bos_token": "<|im_end|>", "unk_token": "<|im_end|>",
    "chat_template": tiny_models.CHATML}))
  (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def test_a_folder_of_older_files_reads_as_transformers_does(tmp_path):
  tokens = tiny_models.byte_tokens()
  vocab = {t: i for i, t in enumerate(tokens)} | {"th": 300, "the": 301}
  _older(tmp_path, vocab, ["t h", "th e"])
  got = Tokenizer.from_folder(tmp_path)
  want = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = _TEXT.replace("<|im_end|>", "the end of the theme")
  ids = got.encode(text)
  assert 301 in ids
  np.testing.assert_array_equal(
    ids, want(text, add_special_tokens=False)["input_ids"])
  assert got.decode(ids) == text
  assert got.stop_ids == (vocab["<|im_end|>"],)
  assert got.has_chat_template


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_folder_of_sentencepiece_reads_as_transformers_does(tmp_path, kind):
  """And, but for leading blanks, as sentencepiece itself."""
  lines = [line for line in _LINES.read_text(encoding="utf-8").split("\n")
           if line]
  made = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines * 20), model_writer=made, vocab_size=400,
    model_type=kind, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    unk_id=0, bos_id=1, eos_id=2, normalization_rule_name="identity",
    remove_extra_whitespaces=False)
  (tmp_path / "tokenizer.model").write_bytes(made.getvalue())
  family = {"bpe": "Llama", "unigram": "T5"}[kind]
  (tmp_path / "config.json").write_text(
    json.dumps({"model_type": family.lower()}))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": f"{family}Tokenizer", "bos_token": "<s>",
    "eos_token": "</s>", "unk_token": "<unk>"}))
  got = Tokenizer.from_folder(tmp_path)
  want = transformers.AutoTokenizer.from_pretrained(tmp_path)
  own = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
  for text in [*lines, "x  y", "Ünïcode 漢字 🙂", "  two"]:
    ids = got.encode(text).tolist()
    assert ids == want(text, add_special_tokens=False)["input_ids"]
    if kind == "bpe" and not text.startswith(" "):
      assert ids == own.encode(text) and got.decode(ids) == text
  assert got.stop_ids == (2,)


def test_a_folder_of_damaged_older_files_is_refused_in_one_line(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"no model of sentencepiece")
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
  with pytest.raises(McjaxError, match="no tokenizer.json") as caught:
    Tokenizer.from_folder(tmp_path)
  assert "\n" not in str(caught.value)
