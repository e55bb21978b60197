"""What the LM attends to while it answers.

The sentences that answer, as far as they stand raw in the window, the history's
first token and the prompt. Where the policy says that nothing answers a turn,
the newest turns of the conversation and no other text. Else, as where a window
shows none of what answers, all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mcjax.answer import turns
from mcjax.base.tokenizer import Tokenizer
from mcjax.config import Config
from mcjax.focus.policy import Policy
from mcjax.runtime.query import Query
from mcjax.tree.tree import MegaContextTree
from mcjax.types import BRANCHING
from mcjax.window.working_context import FIRST, Attention, Entries


class Attended(NamedTuple):
  """What an answer is read from.

  Attributes:
    attention: what the LM attends to; None for the whole window.
    sources: token spans of the sentences that it answers from; empty where it
      attends to all raw text.
    found: token spans that answer the question, attended to or not.
    answerable: how surely the history answers it, in [0, 1].
  """

  attention: Attention | None
  sources: list[tuple[int, int]]
  found: list[tuple[int, int]]
  answerable: float


def attend(query: Query, policy: Policy, config: Config, entries: Entries,
           tree: MegaContextTree, tokenizer: Tokenizer) -> Attended:
  """What answers the query is read from; see `Config.raw_attention`.

  Args:
    query: what is asked, if anything.
    policy: has scored the blocks for it.
    config: of the loop.
    entries: of the window.
    tree: the history.
    tokenizer: of the base.
  """
  attention, sources = None, []
  found = list(policy.sources) if query.asked else []
  answerable = policy.answerable if query.asked else 0.0
  raw = entries.start()[entries.level == 0]
  if query.asked and config.raw_attention != "all":
    sources = [part for span in found for part in _raw_parts(raw, *span)]
  if sources:
    spans = sources
    if config.raw_attention == "blocks":
      spans = [_whole_blocks(a, b) for a, b in spans]
    attention = Attention(
      (FIRST, *spans), query.prompt,
      query.head if config.read_place == "turn" else 0,
      framed=_framed(sources, raw, tree, tokenizer))
  elif query.turn and policy.denies:
    attention = Attention(
      (FIRST, _conversation(query.prompt, config.window, tree, tokenizer)),
      query.prompt, evidence=False)
  return Attended(attention, sources, found, answerable)


def _framed(sources: list[tuple[int, int]], raw: np.ndarray,
            tree: MegaContextTree, tokenizer: Tokenizer
            ) -> tuple[tuple[int, int], ...]:
  """The sources that the user said in a turn, with its role around them.

  As far as all of that is among the tokens `raw` [n], sorted.
  """
  out = []
  for a, b in sources:
    around = turns.frame(tree, tokenizer, a, b)
    if around and np.isin(
        np.concatenate([np.arange(*span) for span in around]), raw).all():
      out += [around[0], (a, b), around[1]]
  return tuple(out)


def _conversation(stop: int, most: int, tree: MegaContextTree,
                  tokenizer: Tokenizer) -> tuple[int, int]:
  """Token span of the turns before `stop` with no other text between.

  At most so many tokens; and of what has been appended since the last block,
  which nobody scored.
  """
  begin = turns.newest(tree, tokenizer, max(0, stop - most), stop)
  return min(begin, stop // BRANCHING * BRANCHING), stop


def _raw_parts(raw: np.ndarray, start: int, stop: int
               ) -> list[tuple[int, int]]:
  """The parts of tokens [start, stop) that are among `raw` [n], sorted."""
  here = raw[(raw >= start) & (raw < stop)]
  runs = np.split(here, np.flatnonzero(np.diff(here) != 1) + 1)
  return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


def _whole_blocks(start: int, stop: int) -> tuple[int, int]:
  """The blocks that a span of tokens touches, as a span."""
  return start // BRANCHING * BRANCHING, -(-stop // BRANCHING) * BRANCHING
