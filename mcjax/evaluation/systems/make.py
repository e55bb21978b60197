"""Systems by name, for the settings of a suite."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

from mcjax.base.load import BaseLM
from mcjax.config import POLICIES, Config
from mcjax.evaluation.systems import retrieval, text_systems
from mcjax.evaluation.systems.loop_system import LoopSystem
from mcjax.evaluation.systems.plain_reader import PlainReader
from mcjax.evaluation.systems.system import System
from mcjax.gist.encoder import load_gistnet
from mcjax.lens.policy import LensNetPolicy, load_lensnet
from mcjax.runtime import policy_choice
from mcjax.types import McjaxError

LOOP = "megacontext"
_VISIBLE = "+gists"
_TURN = "+turn"
_PLAIN = (text_systems.TextSystem, text_systems.Evidence,
          text_systems.FullAttention, text_systems.SlidingWindow,
          text_systems.SinkWindow)
NAMES = (*(c.name for c in _PLAIN), *retrieval.KINDS, LOOP)


class Maker:
  """Makes the systems of one base, which share what they can.

  Args:
    lm: the base.
    window: slots or tokens that each may use.
    trees: folder that keeps ingested histories.
    gistnet: a gistnet.safetensors; the shipped one if empty.
    lensnet: a lensnet.safetensors; the shipped one if empty.
    chunk: tokens of a retriever's chunk.
    seed: of policy random.
  """

  def __init__(self, lm: BaseLM, window: int, trees: pathlib.Path, *,
               gistnet: str = "", lensnet: str = "", chunk: int = 64,
               seed: int = 0, retriever: retrieval.Retriever | None = None):
    self.reader = PlainReader(lm)
    self._lm, self._window, self._trees = lm, window, trees
    self._retriever = retriever or retrieval.Retriever(lm.tokenizer, chunk)
    self._encoder = load_gistnet(lm, gistnet or None)
    self._lensnet, self._seed = lensnet, seed

  def make(self, name: str) -> System:
    """A system.

    Args:
      name: one of NAMES; a text system with "+turn" puts its text inside the
        user's turn; "megacontext" may name a policy, as "megacontext/recency",
        and with "+gists" the LM attends to its gists, else it does not.

    Raises:
      McjaxError: no such system.
    """
    check(name)
    if name.startswith(LOOP):
      return self._loop(name)
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
    """Stands for the weights behind a system, so that a result is theirs."""
    parts = [self._lm.fingerprint]
    if name.startswith(LOOP):
      choice = policy_choice.choose(
        self._config(name), self._lm, self._encoder, self._given())
      parts += [self._encoder.fingerprint]
      parts += [choice.keyer.fingerprint] if choice.keyer else []
    return " ".join(parts)

  def _config(self, name: str) -> Config:
    visible = name.endswith(_VISIBLE)
    policy = name.removesuffix(_VISIBLE).partition("/")[2] or "auto"
    return Config(
      window=self._window, policy=policy, seed=self._seed,
      gist_attention="visible" if visible else "masked")

  def _given(self) -> LensNetPolicy | None:
    """A LensNet of its own for each system, where weights are given."""
    if not self._lensnet:
      return None
    return load_lensnet(self._lm, self._lensnet, gistnet=self._encoder)

  def _loop(self, name: str) -> LoopSystem:
    return LoopSystem(name, self._lm, self._config(name), self._encoder,
                      self._given(), self._trees)


def check(name: str) -> None:
  """Raises a McjaxError if no system has this name."""
  base, _, policy = name.removesuffix(_VISIBLE).partition("/")
  if base == LOOP and (policy or "auto") in POLICIES:
    return
  if name.removesuffix(_TURN) not in NAMES[:-1]:
    raise McjaxError(
      f"no system {name!r}; known: {', '.join(NAMES)}, the last with a policy, "
      f"as {LOOP}/recency, and {_VISIBLE}; the others with {_TURN}")


def check_all(names: Sequence[str], reference: str) -> None:
  """Raises a McjaxError for a wrong name, or a reference that is not there."""
  for name in names:
    check(name)
  if reference not in names:
    raise McjaxError(f"reference: {reference!r} is none of the systems")
