"""Cards of bases: what suits a base, by measurement, as settings.

A card is a JSON file beside the shipped weights. Where a `Config` leaves a
setting to the card, the card's holds, and a base without one gets `Card()`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

from absl import logging

from mcjax.config import RAW_ATTENTION, READ_PLACES, Config
from mcjax.settings import read_fields
from mcjax.types import McjaxError

_ROOT = pathlib.Path(__file__).parent
_FILE = "card.json"
_MAX_BYTES = 1 << 16
_SETTINGS = (
  "read_tokens", "raw_attention", "read_share", "read_place", "contrast")
_UNSET = Config()  # leaves all of them to the card


@dataclasses.dataclass(frozen=True)
class Card:
  """What suits a base; the defaults are safe for one that was not measured.

  Attributes:
    read_tokens: tokens of sentences that are read for an answer at most.
    raw_attention, read_share, read_place, contrast: see `Config`.
    nets: folder beside this one that holds the weights shipped for the base,
      shared by the bases of one tokenizer; its own folder if empty.
    chosen: how the settings were chosen, in words.
  """

  read_tokens: int = 256
  raw_attention: str = "sentences"
  read_share: float = 0.6
  read_place: str = "turn"
  contrast: float = 0.5
  nets: str = ""
  chosen: str = ""

  def __post_init__(self):
    for name, ok in (("read_tokens", self.read_tokens > 0),
                     ("raw_attention", self.raw_attention in RAW_ATTENTION),
                     ("read_share", 0 < self.read_share <= 1),
                     ("read_place", self.read_place in READ_PLACES),
                     ("contrast", self.contrast >= 0),
                     ("nets", "/" not in self.nets and ".." not in self.nets)):
      if not ok:
        raise McjaxError(
          f"config.card.{name} is out of range: {getattr(self, name)!r}")


@functools.cache
def find(base_name: str) -> Card | None:
  """The card shipped for a base of this name, if any.

  Raises:
    McjaxError: the card is damaged.
  """
  path = _ROOT / base_name / _FILE
  if not path.is_file():
    return None
  try:
    return read_fields(Card, "card", _object(path.read_bytes()))
  except (ValueError, TypeError) as error:
    raise McjaxError(f"{path} is no card: {error}") from error


def _object(text: bytes) -> dict:
  value = json.loads(text[:_MAX_BYTES])
  if not isinstance(value, dict):
    raise TypeError("it is no JSON object")
  return value


def of(base_name: str) -> Card:
  """The card of a base; safe settings, and a line that says so, if none."""
  return find(base_name) or _unmeasured(base_name)


@functools.cache
def _unmeasured(base_name: str) -> Card:
  card = Card()
  logging.warning(
    "no card for the base %s: answers read up to %d tokens, contrast %g; "
    "Config sets others", base_name, card.read_tokens, card.contrast)
  return card


def reading(base_name: str) -> str:
  """What the card of a base sets, in words that change with it."""
  card = dataclasses.asdict(of(base_name))
  return " ".join(f"{name}={card[name]}" for name in _SETTINGS)


def settled(config: Config, base_name: str) -> Config:
  """The configuration with the card's values where it leaves them to it."""
  unset = [name for name in _SETTINGS
           if getattr(config, name) == getattr(_UNSET, name)]
  if not unset:
    return config
  card = of(base_name)
  return dataclasses.replace(
    config, **{name: getattr(card, name) for name in unset})
