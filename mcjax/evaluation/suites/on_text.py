"""Settings that the suites on prepared text share."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class OnText:
  """Which base and weights are measured, on which text.

  Attributes:
    base: the base LM, and its dtype below.
    weights: a gistnet.safetensors; the shipped ones if empty.
    data: folder of the token store; the user's cache if empty.
    split: of the store.
    seed: of the excerpts.
  """

  base: str = "smollm2-135m"
  dtype: str = "float32"
  weights: str = ""
  data: str = ""
  split: str = "heldout"
  seed: int = 0
