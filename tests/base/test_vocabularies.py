"""Tokenizers of GGUF files against the ids that llama.cpp expects.

`goldens/llama_cpp_vocabularies.json.xz` holds the test vocabularies of
llama.cpp (models/ggml-vocab-*.gguf with .inp and .out; MIT, from the sdist of
llama-cpp-python 0.3.36), each cut to the tokens that are spelled somewhere in
its texts and the merges among these: nothing else can come of those texts.
"""

import json
import lzma
import pathlib

import gguf
import pytest

from mcjax.base import gguf_vocabulary
from mcjax.base.gguf_file import GgufFile

_FILE = pathlib.Path(__file__).parent / "goldens/llama_cpp_vocabularies.json.xz"
_GOLDENS = json.loads(lzma.decompress(_FILE.read_bytes()))


def _written(path: pathlib.Path, fields: dict) -> pathlib.Path:
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(fields["model"])
  if "pre" in fields:
    writer.add_tokenizer_pre(fields["pre"])
  writer.add_token_list(fields["tokens"])
  writer.add_token_types(fields["token_type"])
  if "merges" in fields:
    writer.add_token_merges(fields["merges"])
  if "scores" in fields:
    writer.add_token_scores(fields["scores"])
  if "add_space_prefix" in fields:
    writer.add_add_space_prefix(fields["add_space_prefix"])
  if "unknown_token_id" in fields:
    writer.add_unk_token_id(fields["unknown_token_id"])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope="module")
def read(tmp_path_factory):
  """The tokenizer of a vocabulary, with some of its fields changed."""
  folder = tmp_path_factory.mktemp("vocabularies")

  def of(name: str, **changed):
    fields = {**_GOLDENS[name]["fields"], **changed}
    file = GgufFile(_written(folder / f"{name}.gguf", fields))
    return gguf_vocabulary.read(file).core

  return of


def _wrong(core, golden: dict) -> list[str]:
  """Texts whose ids are not the expected ones."""
  return [text for text, ids in zip(golden["texts"], golden["ids"], strict=True)
          if core.encode(text, add_special_tokens=False).ids != ids]


@pytest.mark.parametrize("name", _GOLDENS)
def test_ids_are_those_of_llama_cpp(name, read):
  assert len(_GOLDENS[name]["texts"]) >= 46
  assert not _wrong(read(name), _GOLDENS[name])


@pytest.mark.parametrize("name, other", [
  ("command-r", "gpt-2"), ("deepseek-coder", "gpt-2"),
  ("deepseek-llm", "gpt-2"), ("falcon", "gpt-2"),
  ("gpt-2", "falcon"), ("llama-bpe", "gpt-2"), ("qwen2", "gpt-2"),
  ("qwen35", "qwen2"), ("refact", "gpt-2"), ("starcoder", "llama-bpe")])
def test_other_rules_would_be_seen(name, other, read):
  """The texts tell one pre-tokenizer from another."""
  assert _wrong(read(name, pre=other), _GOLDENS[name])
