"""A whole run that fits the choice of sentences to a trained LensNet."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import itertools
import json
from typing import Any, cast

from etils import epath
import numpy as np
import tqdm

from mcjax import pretrained
from mcjax.gist.encoder import GistEncoder
from mcjax.lens import sentence_net
from mcjax.lens.keyer import LensKeyer
from mcjax.lens.weights import read_weights, save_lensnet
from mcjax.parallel import processes
from mcjax.parallel.places import place
from mcjax.settings import read_fields
from mcjax.training.common.data import TokenStore
from mcjax.training.lens import sentences
from mcjax.training.lens.run import (
  LensWindows,
  NoGists,
  made_histories,
  make_files,
)
from mcjax.training.lens.sentences import ReaderFit, SentenceMaker, SentenceSet
from mcjax.training.lens.windows import WindowMaker
from mcjax.types import McjaxError

TOKENS, SHARES = (96, 256), (0.4, 0.2, 0.1, 0.05)  # at which a fit is reported


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
  """See the parts; `mixture` holds (kind, share of the questions)."""

  windows: LensWindows
  fit: ReaderFit
  mixture: tuple[tuple[str, float], ...]


def read_config(values: Mapping[str, Any]) -> ReaderConfig:
  """The run's settings from plain values.

  Raises:
    McjaxError: names an unknown field or an invalid value.
  """
  windows = dict(values["windows"])
  windows["questions"] = tuple(windows["questions"])
  return ReaderConfig(
    read_fields(LensWindows, "windows", windows),
    read_fields(ReaderFit, "fit", values["fit"]),
    tuple(sorted(values["mixture"].items())))


class ReaderRun:
  """Collects candidates, fits, exports; candidates are kept in the workdir.

  Args:
    lm: the frozen base.
    encoder: its GistNet.
    config: the run.
    stores: {split: {kind: TokenStore}} of train and validation.
    workdir: of the candidates.
    lensnet: weights file; the shipped one if None.
    carry_from: base whose shipped choice of sentences is taken over; nothing is
      fitted then.

  Attributes:
    params: LensNet's, with the fitted part once it has run.
    found: what is read of validation questions, by kind and share.
  """

  def __init__(self, lm, encoder, config: ReaderConfig,
               stores: Mapping[str, Mapping[str, TokenStore]], workdir,
               lensnet=None, carry_from: str = ""):
    self._lm, self._config, self._stores = lm, config, stores
    self.workdir = place(workdir)
    self.params, self._lens, self._card = read_weights(
      lm, lensnet, reads=False)
    if self._card is None:
      raise McjaxError(f"{lm.name} has no trained LensNet: train one by "
                       "experiments.train_lensnet, then give it by "
                       "--config.lensnet=FILE")
    if not self._lens.gists:
      encoder = cast(GistEncoder, NoGists(lm.config.d_model))
    self._encoder = encoder
    self._scores = pretrained.fingerprint(  # candidates are those of one net
      {k: self.params[k] for k in ("score", "apart")}, {})[:8]
    self._carried = _shipped_part(carry_from) if carry_from else None
    self.found: dict[str, float] = {}

  def run(self) -> bool:
    """Candidates and fit; False if stopped by a signal."""
    keyer = LensKeyer(self.params, self._lens, self._lm)
    seed = self._config.fit.seed
    maker = SentenceMaker(
      WindowMaker(self._lm, self._encoder, keyer, seed), self.params,
      self._lens, np.asarray(self._lm.params["embed"], np.float32))
    kinds: dict[str, dict[str, SentenceSet]] = {}
    for split in ("train", "validation"):
      if split == "train" and self._carried:
        continue
      files = self._make(split, maker)
      if files is None:
        return False
      kinds[split] = {k: SentenceSet.load(f) for k, f in files.items() if f}
    part = self._carried or sentences.fit(
      kinds["train"], dict(self._config.mixture), self._config.fit,
      tqdm.tqdm.write)
    self.params = {**self.params, sentence_net.PART: part}
    for kind, some in kinds["validation"].items():
      for most, share in itertools.product(TOKENS, SHARES):
        found = sentences.evaluate(part, some, most, share)
        told = ", ".join(f"{k} {v:.3f}" for k, v in found.items())
        tqdm.tqdm.write(
          f"{kind}, read_tokens={most}, read_share={share}: {told}")
        self.found |= {
          f"{kind}@{most},{share}/{k}": v for k, v in found.items()}
    return True

  def _make(self, split: str, maker: SentenceMaker
            ) -> dict[str, list[epath.Path]] | None:
    """Files of candidates by kind; None if stopped."""
    made = made_histories(
      self._config.windows, split, self._lm.tokenizer, self._stores[split],
      self._config.fit.seed)
    folder = self.workdir / "sentences" / self._scores / split
    return make_files(folder, made, maker.write, f"{split} candidates")

  def export(self, path, card: Mapping[str, Any]) -> None:
    """Writes LensNet with the fitted part; its card gets the facts of `card`.
    """
    if processes.is_first():
      save_lensnet(path, self.params, self._lens, {
        **(self._card or {}),
        "reader": json.loads(json.dumps({**card, "validation": self.found}))})


def _shipped_part(base_name: str) -> dict[str, Any]:
  """The choice of sentences in the weights shipped for a base.

  It depends neither on the base nor on its tokenizer.

  Raises:
    McjaxError: none is shipped for a base of this name.
  """
  path = pretrained.shipped(base_name, "lensnet")
  params = pretrained.read_weights(path, "lensnet")[0] if path else {}
  if sentence_net.PART not in params:
    raise McjaxError(f"config.carry_from: no choice of sentences is shipped "
                     f"for {base_name!r}")
  return params[sentence_net.PART]
