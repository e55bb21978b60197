"""What the calls of a MegaContext return."""

from __future__ import annotations

import dataclasses

import numpy as np

from mcjax.runtime.documents import Source
from mcjax.types import Entry


@dataclasses.dataclass(frozen=True)
class IngestStats:
  """What one `ingest` did.

  Attributes:
    tokens: that joined the history.
    seconds: wall clock.
    cursor: tokens in the history now.
    document: name of the document, if it is one.
    skipped: the history held this content already, under that name.
  """

  tokens: int
  seconds: float
  cursor: int
  document: str | None = None
  skipped: bool = False

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds if self.seconds else float("inf")


@dataclasses.dataclass(frozen=True)
class Generation:
  """What one `generate` said.

  Attributes:
    text: the answer, without the stop token.
    token_ids: [n] int32, the stop token included.
    prompt_tokens: tokens the prompt took in the history.
    seconds: wall clock, the prompt included.
    first_token_seconds: until the first block of the answer began.
    focus: the tiling with which the answer began.
    sources: passages that answer the question, best first; where the LM
      attended to less than all raw text of the window, those that it read.
    answerable: how sure the history is to answer, in [0, 1].
    stop_reason: "stop" at a stop token or string, else "length".
    logprobs: [n] float32 of the tokens, before temperature and cuts, where
      they were asked for.
    likely: the likeliest tokens beside each of them and their logprobs, [n, k]
      int32 and float32, where they were asked for.
  """

  text: str
  token_ids: np.ndarray
  prompt_tokens: int
  seconds: float
  first_token_seconds: float
  focus: list[Entry]
  sources: list[Source]
  answerable: float
  stop_reason: str = "length"
  logprobs: np.ndarray | None = None
  likely: tuple[np.ndarray, np.ndarray] | None = None

  def __repr__(self) -> str:
    text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
    return (f"Generation({text!r}, {len(self.token_ids)} tokens in "
            f"{self.seconds:.1f} s, {len(self.sources)} sources)")
