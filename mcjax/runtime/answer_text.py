"""The text of an answer while it grows: whole characters, stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcjax.base.tokenizer import Tokenizer

_HALF = "\ufffd"  # what a decoder gives for half a character


class AnswerText:
  """Tokens of an answer, and what may be shown of them.

  Attributes:
    ids: token ids so far, a stop token excluded.
    ended: by a stop token or a stop string.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
    self.ids: list[int] = []
    self.ended = False
    self._tokenizer = tokenizer
    self._stop = [s for s in (*stop, *tokenizer.stop_texts) if s]
    self._shown = 0

  def add(self, ids: np.ndarray, stopped: bool) -> int:
    """Takes new tokens; how many of them belong to the answer.

    What comes behind a stop string, within the tokens given, does not.

    Args:
      ids: [n] new tokens.
      stopped: the last one is a stop token.
    """
    new = ids.tolist()[: len(ids) - stopped]
    if self._cut(self._decode(self.ids + new)) is not None:
      for count in range(1, len(new) + 1):
        if self._cut(self._decode(self.ids + new[:count])) is not None:
          self.ids += new[:count]
          self.ended = True
          return count
    self.ids += new
    self.ended = stopped
    return len(ids)

  def text(self) -> str:
    """The answer so far, up to a stop string."""
    whole = self._decode(self.ids)
    cut = self._cut(whole)
    return whole if cut is None else whole[:cut]

  def piece(self, last: bool = False) -> str:
    """What can be shown beyond the pieces before.

    Args:
      last: nothing follows; else half a character is kept back, and what may
        become a stop string.
    """
    text = self.text()
    end = len(text)
    if not last and not self.ended:
      end = len(text.rstrip(_HALF))
      for stop in self._stop:
        end = min(end, len(text) - _overlap(text, stop))
    out = text[self._shown : end]
    self._shown = max(self._shown, end)
    return out

  def _decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids)

  def _cut(self, text: str) -> int | None:
    places = [at for s in self._stop if (at := text.find(s)) >= 0]
    return min(places, default=None)


def _overlap(text: str, stop: str) -> int:
  """Characters at the end of a text that may begin a stop string."""
  for size in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:size]):
      return size
  return 0
