"""Facts in books, and pass keys: where they are, what is right."""

import json
import lzma

import numpy as np
import pytest

from mcjax.evaluation.data import hidden_facts
from mcjax.types import McjaxError

_BOOKS = ("It was a dark night. Nobody slept! \n\nWho came? The tide rose. "
          * 200, "A second book. It has few words. " * 300)
_ROW = {"task": "qa2", "facts": ["Mary got the milk.", "Mary went to the hall.",
                                 "Mary got the milk.", "Ann went to the pier."],
        "question": "Where is the milk?", "answer": "hall", "support": [2, 1]}


def words(text):
  return len(text.split())


def test_facts_stand_in_order_where_the_spans_say():
  rng = np.random.default_rng(0)
  for length in (60, 800, 3000):
    sample = hidden_facts.hidden(_ROW, _BOOKS, length, words, rng)
    assert sample.told() == ["Mary went to the hall.", "Mary got the milk."]
    (a, _), (b, _) = sample.evidence
    assert a < b and sample.context.count("Mary got the milk.") == 2
    assert b > sample.context.index("Mary got the milk.")
    assert 0.7 * length <= words(sample.context) <= 1.1 * length + 10
    assert sample.answers == ("hall",)


def test_a_story_of_moves_becomes_a_question_where_someone_is():
  rows = [_ROW, {"task": "qa6", "question": "Is Ann in the hall?",
                 "answer": "no", "support": [0],
                 "facts": ["Ann moved to the barn.", "Bo went back to the inn.",
                           "Ann dropped the milk."]}]
  (made,) = hidden_facts.questions(rows, "qa1")
  assert made["question"] == "Where is Bo?" and made["answer"] == "inn"
  assert made["support"] == [1]
  assert hidden_facts.questions(rows, "qa2") == [_ROW]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_pass_key_lies_at_its_depth(depth):
  sample = hidden_facts.passkey(2000, depth, words, np.random.default_rng(1))
  ((start, stop),) = sample.evidence
  assert sample.answers[0] in sample.context[start:stop]
  assert abs(start / len(sample.context) - depth) < 0.06
  assert 1800 <= words(sample.context) <= 2000


def test_files_that_are_missing_are_named(tmp_path):
  with pytest.raises(McjaxError, match="cannot read"):
    hidden_facts.read_babi(str(tmp_path / "none.xz"))
  with lzma.open(tmp_path / "b.xz", "wt") as file:
    file.write(json.dumps({"author": "x", "title": "y", "text": "z"}) + "\n")
  assert hidden_facts.read_books(str(tmp_path / "b.xz")) == ("z",)
