"""Which policy leads a history: the one a configuration names, or the best.

`policy="auto"` is LensNet where trained weights fit base and GistNet, else
similarity.
"""

from __future__ import annotations

from typing import NamedTuple

from absl import logging

from mcjax import pretrained
from mcjax.base.load import BaseLM
from mcjax.config import Config
from mcjax.focus.controls import Random, Recency
from mcjax.focus.oracle import Oracle
from mcjax.focus.policy import Policy
from mcjax.focus.similarity import Similarity
from mcjax.gist.encoder import GistEncoder
from mcjax.lens.policy import LensNetPolicy, load_keyer, load_lensnet
from mcjax.pretrained import cards
from mcjax.tree.learned_keys import Keyer
from mcjax.tree.tree import MegaContextTree
from mcjax.types import McjaxError


class Choice(NamedTuple):
  """A policy, and who writes learned keys beside it.

  Attributes:
    name: of the policy; never auto.
    policy: scores the entries.
    keyer: writes lens keys; None where no LensNet is known.
  """

  name: str
  policy: Policy
  keyer: Keyer | None


def choose(config: Config, lm: BaseLM, encoder: GistEncoder,
           given: LensNetPolicy | None = None) -> Choice:
  """The policy of a configuration.

  Keys of a shipped LensNet are written under every policy, so that the policy
  can be changed later.

  Args:
    config: names the policy.
    lm: the base.
    encoder: its GistNet.
    given: the LensNet; the shipped one by default.
  """
  config = cards.settled(config, lm.name)
  shipped = pretrained.shipped(lm.name, "lensnet") is not None
  name = config.policy
  keyer: Keyer | None = given.keyer if given else None
  if given:  # it may have been loaded without the history's GistNet
    if given.card and not given.reads(encoder):
      logging.warning("this LensNet was trained on the gists of another "
                      "GistNet than the history's")
  if name == "lensnet" or name == "auto" and (given or shipped):
    learned = given or load_lensnet(lm, gistnet=encoder)
    learned.bind(encoder, config)
    if name == "lensnet" or given or learned.reads(encoder):
      return Choice("lensnet", learned, learned.keyer)
  if name == "auto":
    name = "similarity"
  if shipped and given is None:
    keyer = load_keyer(lm)
  return Choice(name, _hand_written(name, config), keyer)


def for_tree(choice: Choice, config: Config, tree: MegaContextTree) -> Choice:
  """The choice for a tree that was opened; its keyer goes on with the keys.

  A tree whose keys another LensNet wrote is led by similarity, with a warning,
  where the configuration says auto.

  Args:
    choice: of `choose`.
    config: of the loop, settled by the base's card.
    tree: the history.

  Raises:
    McjaxError: policy lensnet was asked for and the tree holds other keys.
  """
  tree.attach_keyer(choice.keyer)
  if (choice.name != "lensnet"
      or choice.keyer
      and tree.lens_fingerprint == choice.keyer.fingerprint):
    return choice
  line = f"{tree.url} holds no keys of this LensNet: run tools/rekey"
  if config.policy == "lensnet":
    raise McjaxError(f"{line}, or take another policy")
  logging.warning("%s; policy similarity until then", line)
  return choice._replace(
    name="similarity", policy=_hand_written("similarity", config))


def _hand_written(name: str, config: Config) -> Policy:
  if name == "similarity":
    return Similarity(config.search_nodes, read_tokens=config.read_tokens)
  if name == "recency":
    return Recency()
  if name == "random":
    return Random(config.seed)
  return Oracle(config)
