"""Systems by name, for the settings of a suite."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
import re

from mcjax.base.load import BaseLM
from mcjax.config import POLICIES, Config
from mcjax.evaluation.report.writer import progress
from mcjax.evaluation.systems import loop_system, retrieval, text_systems
from mcjax.evaluation.systems.loop_system import LoopSystem
from mcjax.evaluation.systems.models import Models
from mcjax.evaluation.systems.plain_reader import PlainReader
from mcjax.evaluation.systems.system import System
from mcjax.pretrained import cards
from mcjax.types import McjaxError

LOOP = "megacontext"
_GISTS = re.compile(r"\+(hidden|gists(\d*))$")
_TURN = "+turn"
_PLAIN = (text_systems.TextSystem, text_systems.Evidence,
          text_systems.FullAttention, text_systems.SlidingWindow,
          text_systems.SinkWindow)
NAMES = (*(c.name for c in _PLAIN), *retrieval.KINDS, LOOP)


class Maker:
  """Makes the systems of one base, which share what they can.

  Args:
    models: the base, its GistNet and LensNet.
    window: slots or tokens that each may use.
    trees: folder that keeps ingested histories.
    chunk: tokens of a retriever's chunk.
    seed: of policy random.
    retriever: by default one with the models it needs.
  """

  def __init__(self, models: Models, window: int, trees: pathlib.Path, *,
               chunk: int = 64, seed: int = 0,
               retriever: retrieval.Retriever | None = None):
    self.reader = PlainReader(models.lm)
    self._models, self._window, self._trees = models, window, trees
    self._retriever = retriever or retrieval.Retriever(
      models.lm.tokenizer, chunk)
    self._seed = seed

  def make(self, name: str) -> System:
    """A system.

    Args:
      name: one of NAMES; a text system with "+turn" puts its text inside the
        user's turn; "megacontext" may name a policy, as "megacontext/recency".
        Its LM attends to as many gists as the card of its GistNet says; with
        "+hidden" to none, with "+gists8" to the newest 8, with "+gists" to all.

    Raises:
      McjaxError: no such system.
    """
    check(name)
    if name.startswith(LOOP):
      return LoopSystem(
        name, self._models, self._config(name), self._trees)
    kind = name.removesuffix(_TURN)
    in_turn = kind != name
    if kind in retrieval.KINDS:
      system = text_systems.Retrieval(
        self.reader, self._window, self._retriever, kind, in_turn)
    else:
      plain = next(c for c in _PLAIN if c.name == kind)
      system = plain(self.reader, self._window, in_turn)
    return system

  def identity(self, name: str) -> str:
    """Stands for the weights behind a system, so that a result is theirs.

    And for what the base's card sets, which changes without them.
    """
    lm = self._models.lm
    if not name.startswith(LOOP):
      return lm.fingerprint
    weights = loop_system.identity(self._models, self._config(name))
    return f"{weights} {cards.reading(lm.name)}"

  def _config(self, name: str) -> Config:
    asked = _GISTS.search(name)
    attention = "auto"
    if asked:
      attention = "masked" if asked[1] == "hidden" else "visible"
    return Config(
      window=self._window, seed=self._seed, gist_attention=attention,
      policy=_GISTS.sub("", name).partition("/")[2] or "auto",
      gists_seen=int(asked[2] or 0) if asked else 0)


def check(name: str) -> None:
  """Raises a McjaxError if no system has this name."""
  base, _, policy = _GISTS.sub("", name).partition("/")
  if base == LOOP and (policy or "auto") in POLICIES:
    return
  if name.removesuffix(_TURN) not in NAMES[:-1]:
    raise McjaxError(
      f"no system {name!r}; known: {', '.join(NAMES)}, the last with a policy, "
      f"as {LOOP}/recency, +gists or +hidden; the others with {_TURN}")


def fits(lm: BaseLM, name: str, tokens: int) -> bool:
  """Whether a system can take a history; tells where full attention cannot.

  Args:
    lm: the base.
    name: of the system.
    tokens: of the history, a question and its answer.
  """
  has = lm.config.max_positions
  whole = name.removesuffix(_TURN) == text_systems.FullAttention.name
  if whole and tokens > has:
    progress(f"{name}: left out, the base has {has:,} positions and "
             f"{tokens:,} tokens must fit")
    return False
  return True


def check_all(names: Sequence[str], reference: str) -> None:
  """Raises a McjaxError for a wrong name, or a reference that is not there."""
  for name in names:
    check(name)
  if reference not in names:
    raise McjaxError(f"reference: {reference!r} is none of the systems")
