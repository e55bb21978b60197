"""The base, its GistNet and its LensNet that an evaluation measures."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from mcjax.base.load import BaseLM, load_base_lm
from mcjax.config import Config
from mcjax.gist.encoder import GistEncoder, load_gistnet
from mcjax.lens.policy import LensNetPolicy, load_lensnet
from mcjax.runtime.megacontext import MegaContext
from mcjax.training.common import data
from mcjax.training.common.data import TokenStore


class Models(NamedTuple):
  """What is measured.

  Attributes:
    lm: the frozen base.
    encoder: its GistNet.
    lensnet: the given LensNet; None leaves the shipped one to the loop.
  """

  lm: BaseLM
  encoder: GistEncoder
  lensnet: LensNetPolicy | None = None

  def create(self, url: str, config: Config) -> MegaContext:
    """An empty history; see `MegaContext.create`."""
    return MegaContext.create(
      url, self.lm, config, self.encoder, self.lensnet)

  def open(self, url: str, config: Config) -> MegaContext:
    """A history that is there; see `MegaContext.open`."""
    return MegaContext.open(url, self.lm, config, self.encoder, self.lensnet)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """What every suite can be given.

  Attributes:
    base: named model, folder or file.
    dtype: of the base.
    gistnet: a gistnet.safetensors; the shipped one if empty.
    lensnet: a lensnet.safetensors; the shipped one if empty.
  """

  base: str = "smollm2-135m"
  dtype: str = "float32"
  gistnet: str = ""
  lensnet: str = ""

  def load(self) -> Models:
    """Loads what is named.

    Raises:
      McjaxError: there is no such base or weights file, or they do not fit.
    """
    lm = load_base_lm(self.base, dtype=self.dtype)
    encoder = load_gistnet(lm, self.gistnet or None)
    lensnet = None
    if self.lensnet:
      lensnet = load_lensnet(lm, self.lensnet, gistnet=encoder)
    return Models(lm, encoder, lensnet)


@dataclasses.dataclass(frozen=True)
class TextSettings(ModelSettings):
  """The models, and text of the token store.

  Attributes:
    data: folder of the store; the user's cache if empty.
    split: of the store.
    seed: of the excerpts.
  """

  data: str = ""
  split: str = "heldout"
  seed: int = 0

  def stores(self, lm: BaseLM) -> dict[str, TokenStore]:
    """The split's documents by kind of text.

    Raises:
      McjaxError: there is no such store, or another tokenizer made it.
    """
    return data.open_split(self.data, self.split, lm=lm)
