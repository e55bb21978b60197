"""Questions: what asks by its form, and what may be read alone."""

import types

import numpy as np
import pytest

from mcjax.answer import passages, questions


@pytest.mark.parametrize("prompt", [
  "Where is the key?", "The key, where is it?\n", "who is the chief pilot",
  "Hello. Which ship sails", "Tell me the code of the pump house.",
  "Please tell me the code.", "list the ships!", "鍵はどこですか\uff1f",
  "Πού είναι\u037e", "I lost the key.\nwhere did I put it",
])
def test_what_asks(prompt):
  assert questions.asks(prompt)


@pytest.mark.parametrize("prompt", [
  "Hello!", "Thank you very much.", "Please continue.", "Go on", "",
  "When I was young, I sailed.", "What a ship!", "I know where it is.",
  "Write a poem about the sea.", "...", "The code of the pump house is",
])
def test_what_does_not(prompt):
  assert not questions.asks(prompt)


class OneBlock:
  """A history of 20 blocks; each token of the query is in one of them."""

  def num_nodes(self, level):
    return 20 * (level == 1)

  def block_frequency(self, ids):
    return np.ones(len(ids), np.int64)


@pytest.mark.parametrize("question, share, tokens, alone", [
  (True, 0.1, 2, True), (False, 0.9, 9, True), (False, 0.9, 5, False),
  (False, 0.4, 9, False),
])
def test_a_long_repetition_is_read_alone_as_for_a_question(
  question, share, tokens, alone
):
  view = types.SimpleNamespace(
    question=question, tree=OneBlock(), query_ids=np.arange(tokens),
    query_weights=np.ones(tokens, np.float32))
  found = {3: passages.Passage(share, range(3, 4), range(96, 120))}
  assert questions.certainty(view, found) == pytest.approx(share)
  assert questions.reads_alone(view, found) is alone
  own = {3: found[3]._replace(own=True)}
  assert questions.certainty(view, own) == 0.0
