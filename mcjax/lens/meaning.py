"""What means the same as a question, where its words find nothing.

A question may share no telling word with the passage that answers it. Then the
sentences are taken whose learned key is nearest to the question's, if the keys
tell what is alike in meaning (`lens_keyer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mcjax.answer import passages
from mcjax.answer.passages import Passage
from mcjax.lens import network as lensnet
from mcjax.lens.keyer import LensKeyer
from mcjax.window.focus_view import FocusView

SENTENCES = 4  # taken at most
_LEAST = 0.4  # likeness from which a sentence is taken
_NEARLY = 0.8  # share of the best one's likeness that another must have


def find_alike(view: FocusView, keyer: LensKeyer, blocks: Iterable[int]
               ) -> dict[int, Passage]:
  """{block: its sentence} of what means most nearly what is asked.

  Args:
    view: the policy's view of a question.
    keyer: makes keys of sentences and of the question.
    blocks: whose keys are nearest to the question's.

  Returns:
    at most `SENTENCES` sentences, in all blocks that they were found in.
  """
  query = keyer.query(view.query_ids, view.query_weights)

  def likeness(ids: np.ndarray) -> np.ndarray:
    keys = keyer.encode_keys(ids).astype(np.int32)
    return keys @ query / np.float64(lensnet.KEY_SCALE**2)

  found = passages.nearest_sentences(
    view.tree, view.context_lm.lm.tokenizer, blocks, likeness,
    view.query_start)
  shares = {p.tokens: p.share for p in found.values()}
  best = sorted(shares, key=lambda tokens: -shares[tokens])[:SENTENCES]
  least = max(_LEAST, _NEARLY * shares[best[0]]) if best else 0.0
  return {block: p for block, p in found.items()
          if p.tokens in best and p.share >= least}
