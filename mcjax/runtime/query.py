"""What a window is focused for: a prompt, or the newest text."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Query:
  """What matters now, for the policies.

  Attributes:
    ids: [Q] int32 tokens.
    weights: [Q] float32.
    start: first token of the history that belongs to it; later spans are no
      answer to it.
    asked: it is a prompt, not just the newest text.
    prompt: first token of the prompt that asks it; earlier text may be hidden
      from the LM.
    head: tokens of the prompt in front of the user's words.
    turn: it is a turn of a chat, not plain text to be continued.
    before: [B] int32 what the user said before it, which it may lean on.
  """

  ids: np.ndarray
  weights: np.ndarray
  start: int
  asked: bool = False
  prompt: int = 0
  head: int = 0
  turn: bool = False
  before: np.ndarray | None = None
