"""Natural questions: whose evidence is where, and how an answer is scored."""

import json
import lzma

import numpy as np
import pytest

from mcjax.evaluation.data import natural, scoring
from mcjax.types import McjaxError


def write(path, rows):
  with lzma.open(path, "wt", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
  return str(path)


def story(number, split="test"):
  return {
    "split": split, "title": f"Story {number}",
    "sections": [{"id": str(i), "text": f"Part {i} of story {number}. " * 8}
                 for i in range(1, 5)],
    "questions": [{"question": f"What is {i} in {number}?",
                   "answers": [f"answer {i}", "it"], "sections": [str(i)],
                   "explicit": True} for i in range(1, 5)]}


@pytest.fixture
def stories(tmp_path):
  rows = [story(i) for i in range(6)] + [story(9, "train")]
  return write(tmp_path / "stories.xz", rows)


def test_evidence_is_the_sections_own_text(stories, tiny_lm):
  documents = natural.read("fairytale", "test", stories)
  assert len(documents) == 6
  found = natural.histories(documents, tiny_lm.tokenizer, length=1800, count=2,
                            questions=5, others=3, seed=1)
  assert len(found) == 2
  for history in found:
    assert len(history.ids) >= 1800
    assert len(history.questions) == 5
    for q in history.questions:
      (start, stop), = q.evidence
      part, number = q.text.split()[2], q.document.split()[1]
      text = tiny_lm.tokenizer.decode(history.ids[start:stop].tolist())
      assert text.strip() == (f"Part {part} of story {number}. " * 8).strip()
  told = [{q.document for q in h.questions} for h in found]
  assert not told[0] & told[1], "a story is in one history only"
  for history, own in zip(found, told):
    assert len(history.others) == 3
    assert not own & {q.document for q in history.others}


def test_stories_come_again_with_other_questions(stories, tiny_lm):
  documents = natural.read("fairytale", "test", stories)
  found = natural.histories(documents, tiny_lm.tokenizer, length=2200, count=3,
                            questions=5, others=2, seed=1)
  asked = [(q.document, q.text) for h in found for q in h.questions]
  assert len(asked) == len(set(asked)) == 15
  for history in found:
    assert not ({q.document for q in history.questions}
                & {q.document for q in history.others})


def test_the_same_seed_gives_the_same_histories(stories, tiny_lm):
  documents = natural.read("fairytale", "test", stories)
  def draw(seed):
    return natural.histories(documents, tiny_lm.tokenizer, length=1000,
                             count=1, questions=4, seed=seed)[0]
  assert draw(3).questions == draw(3).questions
  np.testing.assert_array_equal(draw(3).ids, draw(3).ids)
  assert draw(3).questions != draw(4).questions


def test_meetings_are_answered_by_turns(tmp_path, tiny_lm):
  path = write(tmp_path / "m.xz", [{
    "split": "test", "title": "M", "turns": [["A", "x " * 40]] * 9,
    "questions": [{"question": "Why?", "answer": "so",
                   "spans": [[1, 2], [4, 4]]}]}])
  documents = natural.read("meeting", "test", path)
  (history,) = natural.histories(
    documents, tiny_lm.tokenizer, length=500, count=1, questions=3)
  (question,) = history.questions
  turn = len(tiny_lm.tokenizer.encode(documents[0].parts[0]))
  title = len(tiny_lm.tokenizer.encode("# M\n\n"))
  assert question.evidence == tuple(
    (title + i * turn, title + (i + 1) * turn) for i in (1, 2, 4))


def test_what_is_missing_is_told_in_one_line(tmp_path, stories, tiny_lm):
  with pytest.raises(McjaxError, match="cannot read .*setting `data`"):
    natural.read("fairytale", "test", str(tmp_path / "none.xz"))
  (tmp_path / "no.xz").write_text("text")
  with pytest.raises(McjaxError, match="no xz-compressed"):
    natural.read("fairytale", "test", str(tmp_path / "no.xz"))
  with pytest.raises(McjaxError, match="split must be one of"):
    natural.read("fairytale", "dev", stories)
  with pytest.raises(McjaxError, match="fewer than 100000"):
    natural.histories(natural.read("fairytale", "test", stories),
                      tiny_lm.tokenizer, length=100000, count=1, questions=1)


def test_the_most_frequent_answer(stories):
  documents = natural.read("fairytale", "train", stories)
  assert natural.most_frequent_answer(documents) == "it"


@pytest.mark.parametrize("text, answers, held, f1", [
  ("It was the red, fox!", ["Red fox"], True, 4 / 6),
  ("redfox", ["red fox"], False, 0.0),
  ("an apple", ["The apple"], True, 1.0),
  ("", ["x"], False, 0.0),
  ("two red foxes", ["foxes two"], False, 4 / 5),
])
def test_scores_are_those_of_squad(text, answers, held, f1):
  assert scoring.holds(text, answers) == held
  assert scoring.token_f1(text, answers) == pytest.approx(f1)


@pytest.mark.parametrize("text, says", [
  ("I don't know.", True), ("The text does not mention a king.", True),
  ("It is not explicitly stated.", True), ("", True),
  ("There is no information on it.", True),
  ("The king did not sleep.", False), ("A red fox.", False),
])
def test_declining(text, says):
  assert scoring.declines(text) == says
