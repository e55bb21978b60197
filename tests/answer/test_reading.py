"""What is read for an answer: whole sentences, in order, no one's own words."""

import numpy as np
import pytest

from mcjax.answer import sentences, turns
from mcjax.answer.matching import Matcher
from mcjax.answer.reading import Reader
from mcjax.answer.words import WordTable
from mcjax.testing import tiny_base, tree_reference
from mcjax.tree.tree import MegaContextTree

TEXT = ("The mill stood by the river. Its wheel had not turned for years. "
        "The miller kept a three-legged cat named Ada. She slept on flour.\n"
        "A heading\nNobody came in winter. ")


def reader_of(text, chat=False):
  tokenizer = tiny_base.byte_tokenizer(chat=chat)
  tree = MegaContextTree.create(
    tiny_base.memory_url(), **tree_reference.BASE, vocab_size=300,
    encoder=tree_reference.TinyEncoder())
  ids = text if isinstance(text, np.ndarray) else tokenizer.encode(text)
  tree.append(np.asarray(ids, np.int32))
  zeros = np.zeros((300, 1), np.float32)
  matcher = Matcher(tree, WordTable(tokenizer, zeros, zeros[:, 0]))
  return Reader(tree, tokenizer, matcher), tokenizer, matcher


def read(reader, tokenizer, matcher, question, evidence, most=200, stop=None):
  ids = np.asarray(tokenizer.encode(question), np.int32)
  query = matcher.query(ids, np.ones(len(ids), np.float32))
  tree = reader.tree
  spans = reader.spans(evidence, query, most, stop or tree.cursor)
  return [tokenizer.decode(tree.tokens(a, b)).strip() for a, b in spans]


def test_the_sentence_that_holds_most_of_the_question_comes_first():
  parts = reader_of(TEXT)
  told = read(*parts, "what is the miller's cat named?",
              [(2, 0.9), (3, 0.8)], most=50)
  assert told == ["The miller kept a three-legged cat named Ada."]


def test_sentences_are_whole_in_order_and_never_twice():
  parts = reader_of(TEXT)
  told = read(*parts, "what is the miller's cat named?", [(3, 0.8), (2, 0.9)])
  joined = " ".join(" ".join(told).split())
  assert joined.count("three-legged") == 1
  assert joined in " ".join(TEXT.split()) and joined.endswith(".")


def test_nothing_from_the_prompt_on_is_read():
  parts = reader_of(TEXT)
  told = read(*parts, "miller", [(2, 0.9)], stop=TEXT.index("The miller"))
  assert all("miller" not in sentence for sentence in told)


def test_a_wide_reader_gets_more():
  parts = reader_of(TEXT)
  few = read(*parts, "slept, cat", [(2, 0.9), (3, 0.9)], most=20)
  many = read(*parts, "slept, cat", [(2, 0.9), (3, 0.9)], most=500)
  assert len(" ".join(few)) < len(" ".join(many))


def test_the_models_words_and_earlier_questions_are_no_evidence():
  tokenizer = tiny_base.byte_tokenizer(chat=True)
  turn = tokenizer.chat([
    {"role": "user", "content": "My cat is called Ada."},
    {"role": "assistant", "content": "Your cat is called Tom."},
    {"role": "user", "content": "What is my cat called?"}], first=False,
    add_generation_prompt=False)
  reader, tokenizer, matcher = reader_of(turn.ids, chat=True)
  blocks = [(b, 0.9) for b in range(len(turn.ids) // 32 + 1)]
  told = read(reader, tokenizer, matcher, "cat called", blocks)
  assert told == ["My cat is called Ada."]
  who = turns.speakers(reader.tree, tokenizer, 0, len(turn.ids))
  assert (who[turn.owner == 0] == turns.USER).all()
  assert (who[turn.owner == 1] == turns.MODEL).all()


def test_a_system_prompt_is_no_evidence_and_text_behind_a_turn_is():
  tokenizer = tiny_base.byte_tokenizer(chat=True)
  turn = tokenizer.chat([
    {"role": "system", "content": "You are a cat called Tom."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello."}], first=True,
    add_generation_prompt=False)
  text = np.asarray(tokenizer.encode("A cat called Ada came in."), np.int32)
  ids = np.concatenate([np.asarray(turn.ids, np.int32), text])
  reader, tokenizer, matcher = reader_of(ids, chat=True)
  blocks = [(b, 0.9) for b in range(len(ids) // 32 + 1)]
  told = read(reader, tokenizer, matcher, "cat called", blocks)
  assert told == ["A cat called Ada came in."]
  who = turns.speakers(reader.tree, tokenizer, 0, len(ids))
  assert (who[-len(text):] == turns.TEXT).all()


def test_a_sentence_longer_than_what_is_looked_at_is_cut_between_words():
  words = [f"word{i}" for i in range(80)]
  reader, tokenizer, matcher = reader_of(
    " ".join(words) + "." + " The end." * 9)
  whole = range(reader.tree.num_nodes(1))
  spans = sorted(reader.candidates([(b, 0.9) for b in whole],
                                   reader.tree.cursor))
  assert len(spans) > 10
  assert all(a[1] == b[0] for a, b in zip(spans[:-1], spans[1:]))
  told = [tokenizer.decode(reader.tree.tokens(*span)) for span in spans]
  assert {w.strip(".") for text in told for w in text.split()} <= {
    *words, "The", "end"}
  assert len(read(reader, tokenizer, matcher, "word33",
                  [(b, 0.9) for b in whole], most=500)) >= 1


def test_what_one_block_sees_whole_is_not_read_in_part_too():
  text = "A b. " * 20 + "x" * 70 + " y" * 35 + ". The end. " * 20
  reader, _, _ = reader_of(text)
  blocks = [(b, 0.5 + b / 100) for b in range(reader.tree.num_nodes(1))]
  spans = sorted(reader.candidates(blocks, reader.tree.cursor))
  assert all(a[1] <= b[0] for a, b in zip(spans[:-1], spans[1:]))


def test_the_newest_turns_begin_behind_other_text():
  tokenizer = tiny_base.byte_tokenizer(chat=True)
  turn = tokenizer.chat([
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you"}], first=False,
    add_generation_prompt=False).ids
  text = np.asarray(tokenizer.encode("A cat called Ada came in.\n"), np.int32)
  for ids, expected in (
      (np.concatenate([turn, text, turn]), len(turn) + len(text)),
      (np.concatenate([turn, turn]), 0), (np.concatenate([turn, text]), None)):
    tree = reader_of(ids, chat=True)[0].tree
    begin = turns.newest(tree, tokenizer, 0, len(ids))
    assert len(ids) - 1 <= begin if expected is None else (
      begin in (expected, expected - 1))


def test_what_the_user_said_last_is_known():
  tokenizer = tiny_base.byte_tokenizer(chat=True)
  turns_ids = tokenizer.chat([
    {"role": "user", "content": "Who runs the mill?"},
    {"role": "assistant", "content": "Ada does."},
    {"role": "user", "content": "And since when?"},
    {"role": "assistant", "content": "Since May."}], first=False,
    add_generation_prompt=False).ids
  text = np.asarray(tokenizer.encode("A cat came in.\n" * 5), np.int32)
  for ids, said in ((text, ""), (np.concatenate([text, turns_ids]),
                                 "And since when?"),
                    (np.concatenate([turns_ids, text]), "And since when?")):
    tree = reader_of(ids, chat=True)[0].tree
    assert tokenizer.decode(turns.asked_before(tree, tokenizer)).strip() == said


def test_the_newest_tokens_before_the_prompt_may_answer():
  parts = reader_of(TEXT + "The pilot is Kai. ")
  stop = parts[0].tree.cursor
  assert stop % 32 and stop // 32 * 32 < stop - 17
  told = read(*parts, "who is the pilot?", [(2, 0.9)], most=20)
  assert told == ["The pilot is Kai."]
  assert read(*parts, "who is the pilot?", []) == []


@pytest.mark.parametrize("text, expected", [
  ("One. Two", 2), ("3.14 is pi", 1), ('He said "no." Then', 2),
  ("a\nb", 2), ("\u6e2f\u3002\u53e3", 2)])
def test_sentences_end_where_they_do(text, expected):
  pieces = list(text)
  ends = sentences.sentence_ends(pieces, np.zeros(len(pieces), bool))
  spans = [s for s in sentences.sentence_spans(ends)
           if "".join(pieces[s[0] : s[1]]).strip()]
  assert len(spans) == expected


def test_a_wrapped_line_goes_on_and_a_heading_does_not():
  wrapped = ("\nThe project moves our booking system to new servers, and it is "
             "led by\nRavi Chandran until May. Next")
  quoted = wrapped.replace("Ravi", "`ravi`")
  code = wrapped.replace("Ravi Chandran", "```\nRavi")
  for text, expected in ((wrapped, 3), (quoted, 3), (code, 5),
                         ("A heading\nThe text. Next", 3)):
    pieces = list(text)
    ends = sentences.sentence_ends(pieces, np.zeros(len(pieces), bool))
    assert len(sentences.sentence_spans(ends)) == expected
