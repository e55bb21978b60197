"""Whose words the tokens of a history are: text, the user's, the model's."""

from __future__ import annotations

import numpy as np

from mcjax.base.tokenizer import Tokenizer
from mcjax.tree.tree import MegaContextTree

TEXT, USER, MODEL, TEMPLATE = range(4)
_TURN = 512  # tokens back to where a turn opened, at most


def speakers(tree: MegaContextTree, tokenizer: Tokenizer, start: int, stop: int
             ) -> np.ndarray:
  """TEXT, USER, MODEL or TEMPLATE for each token of [start, stop), int8 [n].

  Told by what the chat template writes in front of a turn, without a control
  token since. A turn of another role (a system prompt) is the template's.
  """
  out = np.zeros(max(0, stop - start), np.int8)
  if not has_turns(tree, tokenizer):
    return out
  low = max(0, start - _TURN)
  ids = tree.tokens(low, stop)
  at = np.arange(len(ids))
  special = np.isin(ids, list(tokenizer.special_ids))
  control = np.maximum.accumulate(np.where(special, at, -1))
  template = np.zeros(len(ids), bool)
  said = np.zeros(len(ids), np.int8)
  for who, opening in ((USER, tokenizer.question_ids),
                       (MODEL, tokenizer.answer_ids)):
    size = len(opening)
    if not size or len(ids) < size:
      continue
    windows = np.lib.stride_tricks.sliding_window_view(ids, size)
    heads = np.flatnonzero(np.all(windows == opening, axis=1))
    template[(heads[:, None] + np.arange(size)).ravel()] = True
    opened = np.zeros(len(ids) + 1, bool)
    opened[heads + size] = True
    since = np.maximum.accumulate(np.where(opened[:-1], at, -1))
    said[(since >= 0) & (control < since)] = who
  opens = tokenizer.question_ids
  opens = opens[np.isin(opens, list(tokenizer.special_ids))]
  if len(opens):  # the control token that text of a turn comes after
    inside = (control >= 0) & (ids[control] == opens[-1])
    said[inside & (said == TEXT)] = TEMPLATE
  said[template] = TEMPLATE
  return said[start - low :]


def frame(tree: MegaContextTree, tokenizer: Tokenizer, start: int, stop: int
          ) -> tuple[tuple[int, int], ...]:
  """Token spans of what the template writes before and behind a user's turn.

  Of that in which the tokens [start, stop) were said; none around other text.
  """
  low, high = max(0, start - _TURN), min(tree.cursor, stop + _TURN)
  said = speakers(tree, tokenizer, low, high) == USER
  edges = np.flatnonzero(~said) + low
  before, behind = edges[edges < start], edges[edges >= stop]
  if not said[start - low] or not len(before) or not len(behind):
    return ()
  first, last = int(before[-1]) + 1, int(behind[0])
  return ((first - len(tokenizer.question_ids), first),
          (last, last + len(tokenizer.end_of_turn_ids)))


def newest(tree: MegaContextTree, tokenizer: Tokenizer, start: int, stop: int
           ) -> int:
  """Where the turns begin that end at `stop`, with no other text between.

  `start` at the earliest; `stop` where what ends there is other text.
  """
  who = speakers(tree, tokenizer, start, stop)
  special = list(tokenizer.special_ids)
  for at in np.flatnonzero(who == TEXT)[::-1].tolist():
    ids = tree.tokens(start + at, start + at + 1)
    if ids[0] not in special and tokenizer.decode(ids).strip():
      return start + at + 1
  return start


def asked_before(tree: MegaContextTree, tokenizer: Tokenizer) -> np.ndarray:
  """Ids [n] of the user's newest words in a chat; none without one."""
  start = max(0, tree.cursor - _TURN)
  said = speakers(tree, tokenizer, start, tree.cursor) == USER
  ends = np.flatnonzero(said[:-1] & ~said[1:]) + 1
  if not len(ends):
    return np.zeros(0, np.int32)
  stop = int(ends[-1])
  return tree.tokens(start + int(np.flatnonzero(~said[:stop])[-1]) + 1
                     if not said[:stop].all() else start, start + stop)


def has_turns(tree: MegaContextTree, tokenizer: Tokenizer) -> bool:
  """Whether the history may hold turns of a chat."""
  special = np.array(sorted(tokenizer.special_ids), np.int64)
  special = special[special < tree.vocab_size]
  newest = tree.tokens(tree.cursor // 32 * 32, tree.cursor)
  return bool(tree.block_frequency(special).any()
              or np.isin(newest, special).any())
