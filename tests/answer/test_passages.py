"""Passages: sentences across block edges, and what a question shares with them.
"""

import re

import numpy as np
import pytest

from mcjax.answer import passages
from mcjax.testing import tiny_base
from mcjax.types import BRANCHING

BLOCK = 4


class TokensOnly:
  """A tree of which only tokens are read."""

  def __init__(self, ids):
    self._ids = ids
    self.cursor = len(ids)

  def tokens(self, start, stop):
    assert 0 <= start <= stop <= self.cursor
    return self._ids[start:stop]


def passage_of(text, query, block=BLOCK, stop=None, weight=None):
  """One byte is one token."""
  tokenizer = tiny_base.byte_tokenizer()
  ids = tokenizer.encode(text)
  asked = tokenizer.encode(query)
  weights = np.array([
    (weight or {}).get(c, 1.0) for c in query], np.float32)
  found = passages.find_passages(
    TokensOnly(ids), tokenizer, [block], asked, weights,
    len(ids) if stop is None else stop)
  return found[block]


def test_a_reader_reads_every_block_once():
  tokenizer = tiny_base.byte_tokenizer()
  ids = tokenizer.encode(placed("THE CODE IS 7314.", BLOCK * BRANCHING + 2))
  asked = tokenizer.encode("CODE")
  tree, read = TokensOnly(ids), []
  spans = tree.tokens
  tree.tokens = lambda a, b: read.append((a, b)) or spans(a, b)
  args = tree, tokenizer, asked, np.ones(len(asked), np.float32), len(ids)
  reader = passages.PassageReader(*args)
  first = reader.find([BLOCK, 2])
  assert list(first) == [BLOCK, 2] and first[BLOCK].share == 1.0
  seen = len(read)
  assert reader.find([2]) == {2: first[2]} and len(read) == seen
  assert list(reader.find([2, 6, BLOCK])) == [2, 6, BLOCK]
  assert len(read) > seen


def placed(sentence, at, size=10 * BRANCHING):
  """Lines of dashes around a sentence that begins at token `at`."""
  return "-" * (at - 1) + "\n" + sentence + "\n" + "-" * (size - at)


def test_ends_of_sentences_and_lines():
  pieces = ["A", " b", ".", " C", "3", ".", "1", "!\"", "\n", "x.y", ".)"]
  assert passages.sentence_ends(pieces).tolist() == [
    False, False, True, False, False, False, False, True, True, False, True]


@pytest.mark.parametrize("offset,touched", [
  (2, [BLOCK]), (-9, [BLOCK - 1, BLOCK]), (25, [BLOCK, BLOCK + 1]),
])
def test_a_passage_is_the_blocks_its_sentence_touches(offset, touched):
  text = placed("THE CODE IS 7314.", BLOCK * BRANCHING + offset)
  found = passage_of(text, "CODE")
  assert list(found.blocks) == touched
  assert found.share == 1.0
  sentence = text[found.tokens.start : found.tokens.stop]
  assert sentence.strip() == "THE CODE IS 7314."


def test_the_sentence_that_shares_most_counts():
  text = placed("THE CAT. THE CODE IS 7.", BLOCK * BRANCHING - 7)
  assert list(passage_of(text, "CODE").blocks) == [BLOCK]
  assert list(passage_of(text, "CAT").blocks) == [BLOCK - 1, BLOCK]
  half = passage_of(text, "CODEXYZW")
  assert half.share == pytest.approx(7 / 15)  # 4 of 8 tokens, 3 of 7 pairs


def test_a_long_sentence_reaches_sixteen_tokens_beyond_what_is_shared():
  text = "-" * (BLOCK * BRANCHING + 16) + "Q" + "-" * 30 + ". " + "-" * 200
  found = passage_of(text, "Q")
  assert list(found.blocks) == [BLOCK, BLOCK + 1]
  assert text[found.tokens.start : found.tokens.stop] == (
    "-" * 16 + "Q" + "-" * 16)
  text = text[1:]
  assert list(passage_of(text, "Q").blocks) == [BLOCK - 1, BLOCK]


def test_a_line_that_is_no_sentence_goes_on():
  text = placed("def Q():\n  return 7\n\n", BLOCK * BRANCHING + 4)
  found = passage_of(text, "Q")
  assert text[found.tokens.start : found.tokens.stop] == (
    "def Q():\n  return 7\n\n\n" + "-" * 15)
  assert list(found.blocks) == [BLOCK, BLOCK + 1]
  closed = placed("Q is 7.\nIt is so.\n", BLOCK * BRANCHING + 4)
  found = passage_of(closed, "Q")
  assert closed[found.tokens.start : found.tokens.stop].strip() == "Q is 7."
  assert list(found.blocks) == [BLOCK]


def test_a_turn_of_a_chat_goes_on_to_its_end_only():
  tokenizer = tiny_base.byte_tokenizer()
  end = min(tokenizer.special_ids)
  ids = np.concatenate([
    tokenizer.encode("-" * 130 + "\nthe code is Q"), [end],
    tokenizer.encode("\nwhat else is there?" + "-" * 200)])
  found = passages.find_passages(
    TokensOnly(ids), tokenizer, [BLOCK], tokenizer.encode("Q"),
    np.ones(1, np.float32), len(ids))[BLOCK]
  text = tokenizer.decode(ids[found.tokens.start : found.tokens.stop].tolist())
  assert text == "the code is Q"


def test_without_anything_shared_it_is_the_block_itself():
  found = passage_of("-" * 400, "Q")
  tokens = range(BLOCK * BRANCHING, (BLOCK + 1) * BRANCHING)
  whole = passages.Passage(0.0, range(BLOCK, BLOCK + 1), tokens)
  assert found == whole
  weightless = passage_of(placed("A Q.", 130), "Q", weight={"Q": 0.0})
  assert weightless == whole


def test_spans_are_in_order_and_none_comes_twice():
  early, late = (
    passages.Passage(1.0, range(1), range(at, at + 5)) for at in (3, 40))
  assert passages.spans([late, early, late]) == ((3, 8), (40, 45))
  less = early._replace(share=0.7)
  assert passages.spans([late, less]) == ((40, 45),)
  assert passages.spans([]) == ()


def test_the_query_itself_is_not_read():
  start = (BLOCK + 1) * BRANCHING
  text = "-" * start + "WHAT IS THE CODE?" + "-" * 60
  assert passage_of(text, "CODE", stop=start).share == 0.0


@pytest.mark.parametrize("block", [0, 9])
def test_the_ends_of_the_history(block):
  text = ("CODE." + "-" * 310 + ".CODE")[: 10 * BRANCHING]
  assert len(text) == 10 * BRANCHING
  found = passage_of(text, "CODE", block=block)
  assert found.share == 1.0 and block in found.blocks
  assert found.blocks.start >= 0 and found.blocks.stop <= 10


@pytest.mark.parametrize("text, expected", [
  ("Who sails?", True), ("Who sails?\"\n", True), ("Sails (why?)", True),
  ("It sails.", False), ("Who? Me.", False), ("", False),
])
def test_a_question_ends_with_its_mark(text, expected):
  assert passages.is_question(list(text), np.zeros(len(text), bool)) is expected
  marked = [*text, "<|im_end|>", "\n"]
  special = np.arange(len(marked)) == len(text)
  assert passages.is_question(marked, special) is expected


def test_a_passage_says_whether_it_asks():
  asked = passage_of(placed("is the ship red?", 4 * BRANCHING), "ship red")
  told = passage_of(placed("the ship is red.", 4 * BRANCHING), "ship red")
  assert asked.asks and not told.asks
  assert asked.share == pytest.approx(told.share)


def chat_passage(text, query, block=BLOCK):
  """The passage in a conversation; `<` ends a turn, `>` opens an answer."""
  tokenizer = tiny_base.byte_tokenizer(chat=True)
  parts = []
  for piece in re.split("([<>])", text):
    parts.append({"<": [tiny_base.STOP], ">": tokenizer.answer_ids}.get(
      piece, tokenizer.encode(piece)))
  ids = np.concatenate(parts).astype(np.int32)
  found = passages.find_passages(
    TokensOnly(ids), tokenizer, [block], tokenizer.encode(query),
    np.ones(len(query), np.float32), len(ids))[block]
  said = tokenizer.decode(ids[found.tokens.start : found.tokens.stop].tolist())
  return found, said


def test_a_question_that_ends_its_turn_tells_nothing():
  before = "-" * (BLOCK * BRANCHING - 1) + "\n"
  asked = before + "is the ship RED?"
  found, _ = chat_passage(asked + "<" + "-" * 99, "RED")
  assert found.share == 0.0
  found, said = chat_passage(asked + " It is, all of it.<" + "-" * 99, "RED")
  assert found.asks and said == "is the ship RED? It is, all of it."
  found, _ = chat_passage(asked, "RED")  # the newest thing said
  assert found.share == 0.0


def test_what_the_model_said_is_known_by_the_template():
  before = "-" * (BLOCK * BRANCHING - 60) + "<"
  fact = "the ship is RED."
  found, said = chat_passage(before + ">" + "-" * 40 + "\n" + fact + "<", "RED")
  assert found.own and said == fact
  found, said = chat_passage(
    before + ">" + "-" * 20 + "<\n" + "-" * 20 + "\n" + fact, "RED")
  assert not found.own and said == fact  # said in the turn behind it
  for lines, own in ((7, True), (10, False)):  # 64 tokens each, 512 are seen
    long = ">" + ("-" * 63 + "\n") * lines
    found, said = chat_passage(
      long + fact + "<" + "-" * 99, "RED", block=(64 * lines + 16) // BRANCHING)
    assert said == fact and found.own is own


def test_of_a_block_what_is_told_counts_first():
  opening = len(tiny_base.byte_tokenizer(chat=True).answer_ids)
  before = "-" * (BLOCK * BRANCHING - opening) + ">"
  found, said = chat_passage(
    before + "RED RED.<\nit is RED.\n" + "-" * 99, "RED RED")
  assert said.strip() == "it is RED." and not found.own
  found, said = chat_passage(
    before + "RED RED.<\nit is so.\n" + "-" * 99, "RED RED")
  assert said.strip() == "RED RED." and found.own


def test_the_best_sentences_count_once_each():
  def passage(share, start, asks=False):
    return passages.Passage(share, range(1), range(start, start + 9), asks)

  given = {1: passage(0.5, 0), 2: passage(0.9, 40), 3: passage(0.9, 40),
           4: passage(0.9, 90, asks=True), 5: passage(0.7, 60)}
  assert list(passages.best_sentences(given, 2)) == [2, 3, 4]
  assert list(passages.best_sentences(given, 9)) == [2, 3, 4, 5, 1]


def test_what_others_say_counts_before_questions_and_own_words():
  def passage(share, asks, own=False):
    return passages.Passage(share, range(1), range(9), asks, own)

  told, weak = passage(0.9, False), passage(0.6, False)
  asked, first = passage(0.8, True), passage(1.0, True)
  assert passages.statements({1: told, 2: asked, 3: weak}) == {1: told, 3: weak}
  # a page of questions and answers: the question leads to its answer
  assert passages.statements({1: told, 2: first}) == {
    1: told, 2: first._replace(share=0.9)}
  faint, vague = passage(0.2, False), passage(0.25, True)
  assert passages.statements({1: faint, 2: vague}) == {1: faint}
  assert passages.statements({1: faint, 2: first}) == {1: faint, 2: first}
  own = passage(1.0, False, own=True)
  assert passages.statements({1: weak, 2: own}) == {1: weak}
  assert passages.statements({1: weak, 2: own, 3: first}) == {
    1: weak, 3: first._replace(share=0.6)}
  assert passages.statements({1: faint, 2: own}) == {1: faint, 2: own}
  assert passages.statements(
    {1: faint, 2: own._replace(share=0.25)}) == {1: faint}
  assert passages.statements({1: passage(0.0, False)}) == {}
  assert passages.statements({}) == {}


def test_the_sentence_most_alike_is_found_whole():
  """Likeness is the share of Q in a sentence; over a block's edge too."""
  fact = "Q QQ QQQ QQQQ."
  text = placed("ONE Q. " + fact, BLOCK * BRANCHING + 14)
  tokenizer = tiny_base.byte_tokenizer()
  ids = tokenizer.encode(text)
  wanted = tokenizer.encode("Q")[0]

  def likeness(sentences):
    assert sentences.ndim == 2
    return (sentences == wanted).sum(axis=1) / (sentences >= 0).sum(axis=1)

  found = passages.nearest_sentences(
    TokensOnly(ids), tokenizer, [BLOCK], likeness, len(ids))[BLOCK]
  assert text[found.tokens.start : found.tokens.stop].strip() == fact
  assert found.share == pytest.approx(10 / 15)
  assert list(found.blocks) == [BLOCK, BLOCK + 1]


def test_questions_and_own_words_are_not_what_is_alike():
  tokenizer = tiny_base.byte_tokenizer(chat=True)
  opening = len(tokenizer.answer_ids)
  ids = np.concatenate([
    tokenizer.encode("-" * (BLOCK * BRANCHING - opening)), tokenizer.answer_ids,
    tokenizer.encode("QQQQ."), [tiny_base.STOP],
    tokenizer.encode("QQQ?\nOR Q.\n" + "-" * 200)]).astype(np.int32)
  wanted = tokenizer.encode("Q")[0]
  found = passages.nearest_sentences(
    TokensOnly(ids), tokenizer, [BLOCK, BLOCK - 3],
    lambda sentences: (sentences == wanted).sum(axis=1), len(ids))
  a, b = found[BLOCK].tokens.start, found[BLOCK].tokens.stop
  assert tokenizer.decode(ids[a:b].tolist()).strip() == "OR Q."
  assert not passages.nearest_sentences(  # but for its own words all to come
    TokensOnly(ids), tokenizer, [BLOCK], lambda sentences: 1 / 0,
    BLOCK * BRANCHING + 5)
