"""Words of blocks and queries: folded, rare, spelled and meant alike."""

import numpy as np
import pytest

from mcjax.answer import words
from mcjax.answer.matching import MARKS, Matcher
from mcjax.answer.words import WordTable
from mcjax.testing import tiny_base, tree_reference
from mcjax.tree.tree import MegaContextTree

LINES = ("the keeper of the light is old", "Rain fell on the HARBOUR all day",
         "nobody sails to the northern rocks", "a lamp burns, does it not?")


def matcher_of(text):
  """Of a history of `text`, a token a character."""
  tokenizer = tiny_base.byte_tokenizer()
  rng = np.random.default_rng(0)
  table = WordTable(tokenizer, rng.normal(size=(300, 8)).astype(np.float32),
                    np.ones(300, np.float32))
  tree = MegaContextTree.create(
    tiny_base.memory_url(), **tree_reference.BASE, vocab_size=300,
    encoder=tree_reference.TinyEncoder())
  tree.append(tokenizer.encode(text))
  return Matcher(tree, table)


@pytest.fixture(scope="module")
def matcher():
  return matcher_of("".join(f"{line:34.34}"[:31] + " " for line in LINES))


def query(matcher, text):
  ids = np.asarray(matcher.table.tokenizer.encode(text), np.int32)
  return matcher.query(ids, np.ones(len(ids), np.float32))


def test_words_match_whatever_their_case(matcher):
  found = matcher.match(np.arange(4), query(matcher, "harbour Keeper"))
  np.testing.assert_array_equal(
    found.exact, [[0, 1], [1, 0], [0, 0], [0, 0]])
  assert found.times[1, 0] == 1


def test_spelling_tells_words_alike(matcher):
  found = matcher.match(np.arange(4), query(matcher, "lamps harbor zzz"))
  assert found.exact.max() == 0
  assert found.spelling[3, 0] > 0.4 and found.spelling[1, 1] > 0.4
  assert found.spelling[:, 2].max() < 0.2


def test_two_words_in_order_are_a_pair(matcher):
  forward = matcher.match(np.arange(4), query(matcher, "the northern"))
  backward = matcher.match(np.arange(4), query(matcher, "northern the"))
  assert forward.pairs[2, 0] == 1 and backward.pairs.max() == 0


def test_rare_words_weigh_more_and_unknown_ones_are_told(matcher):
  q = query(matcher, "a harbour")
  assert q.weights[1] >= q.weights[0]
  assert query(matcher, "a harbour a").ids.tolist() == q.ids.tolist()
  assert query(matcher, "qqqq").known < 1


@pytest.mark.parametrize("runs", [32, 2, 1])
def test_a_number_among_numbers_is_rare(runs, monkeypatch):
  monkeypatch.setattr(words, "SAMPLE", runs)  # 1: 32 of 100 blocks
  numbers = np.random.default_rng(1).integers(10**6, 10**7, 100).tolist()
  among = matcher_of("".join(f"{f'order {n} is ready':31} " for n in numbers))
  order, number = query(among, f"order {numbers[70]}").weights
  assert order < 0.1  # every block has it, and every digit
  assert number > np.log(len(numbers) / 4)


def test_what_no_sampled_block_holds_may_be_elsewhere(monkeypatch):
  monkeypatch.setattr(words, "SAMPLE", 1)
  among = matcher_of("".join(
    f"{'seen once' if i == 40 else 'seen often':31} " for i in range(100)))
  seen, once, often = query(among, "seen once often").weights
  assert max(seen, often) < once


def test_what_was_taken_back_is_not_counted():
  among = matcher_of(f"{'day and night':31} " * 40)
  tree, tokenizer = among._tree, among.table.tokenizer
  before = query(among, "storm day").weights
  mark = tree.mark()
  tree.append(tokenizer.encode(f"{'storm at night':31} " * 20))
  assert query(among, "storm day").weights[0] < before[0]
  assert tree.back_to(mark)
  np.testing.assert_array_equal(query(among, "storm day").weights, before)
  tree.append(tokenizer.encode(f"{'day and night':31} " * 20))
  storm, day = query(among, "storm day").weights
  assert storm > before[0] and day < 0.1


def test_a_words_vector_is_that_of_its_tokens(matcher):
  same = query(matcher, "light").ids
  np.testing.assert_allclose(
    matcher.table.meaning(same, same), 1.0, rtol=1e-4)


def test_marks_say_what_asks(matcher):
  marks = matcher.marks(np.arange(4))
  assert marks.shape == (4, len(MARKS))
  np.testing.assert_array_equal(marks[:, MARKS.index("question_mark")],
                                [0, 0, 0, 1])


def test_an_empty_query_matches_nothing(matcher):
  q = query(matcher, "?!")
  assert not len(q.ids)
  assert matcher.match(np.arange(4), q).exact.shape == (4, 0)


def test_characters_of_several_bytes_are_words():
  tokenizer = tiny_base.byte_tokenizer()
  table = WordTable(tokenizer, np.zeros((300, 1), np.float32),
                    np.zeros(300, np.float32))
  ids = np.asarray(tokenizer.encode("Größe für \u6e2f\u53e3"), np.int32)
  assert [w for w, *_ in table.read(ids)] == ["grösse", "für", "\u6e2f\u53e3"]


def test_what_was_taken_back_is_forgotten(matcher):
  tree, encode = matcher._tree, matcher.table.tokenizer.encode
  first = tree.num_nodes(1)
  blocks, span = np.array([first]), (first * 32, first * 32 + 30)

  def seen(by):
    return [*by.match(blocks, query(by, "lantern ferry")), by.marks(blocks),
            by.gists(blocks), by.sentence(span).words]

  with tree.transient():
    tree.append(np.asarray(encode("no one saw the ferry come in?   ")))
    before = seen(matcher)
  tree.append(np.asarray(encode("a lantern hung over the landing.")))
  after = seen(matcher)
  assert before[0].tolist() == [[0, 1]] and after[0].tolist() == [[1, 0]]
  for mine, new in zip(after, seen(Matcher(tree, matcher.table)), strict=True):
    np.testing.assert_array_equal(mine, new)
  assert list(matcher._gists) == [first]
